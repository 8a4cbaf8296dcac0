"""Inside the Xen bed: carry out orders. ``python -m tests.testbeds.xen.agent``."""

from __future__ import annotations

from tests.testbeds.agent import serve
from tests.testbeds.xen.post import inside

if __name__ == "__main__":
    serve(inside())
