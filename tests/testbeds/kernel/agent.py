"""Inside the kernel bed: carry out orders. ``python -m tests.testbeds.kernel.agent``."""

from __future__ import annotations

from tests.testbeds.agent import serve
from tests.testbeds.kernel.post import inside

if __name__ == "__main__":
    serve(inside())
