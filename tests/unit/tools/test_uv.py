"""tools/uv: what pip is configured with reaches uv, and nothing else is invented."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "tools" / "uv"
ALWAYS = {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_PYTHON_DOWNLOADS": "never"}


@pytest.fixture(scope="module")
def uv_environment() -> Callable[[dict[str, str]], dict[str, str]]:
    loader = SourceFileLoader("tools_uv", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    function: Callable[[dict[str, str]], dict[str, str]] = module.uv_environment
    return function


def test_unconfigured_pip_leaves_uv_its_defaults(
    uv_environment: Callable[[dict[str, str]], dict[str, str]],
) -> None:
    assert uv_environment({}) == ALWAYS | {"UV_SYSTEM_CERTS": "true"}


def test_every_setting_of_pip_has_its_variable(
    uv_environment: Callable[[dict[str, str]], dict[str, str]], tmp_path: Path
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    pip = {
        "index-url": "https://index.invalid/simple",
        "extra-index-url": f"https://more.invalid/simple\nfile://{wheels}",
        "find-links": f"{wheels} https://links.invalid/",
        "trusted-host": "index.invalid more.invalid",
        "no-index": "true",
        "timeout": "180",
        "cert": "/etc/ssl/own.pem",
        "proxy": "http://proxy.invalid:3128",
    }
    assert uv_environment(pip) == ALWAYS | {
        "UV_DEFAULT_INDEX": "https://index.invalid/simple",
        "UV_INDEX": f"https://more.invalid/simple file://{wheels}",
        "UV_FIND_LINKS": f"{wheels},https://links.invalid/",
        "UV_INSECURE_HOST": "index.invalid more.invalid",
        "UV_NO_INDEX": "1",
        "UV_HTTP_TIMEOUT": "180",
        "SSL_CERT_FILE": "/etc/ssl/own.pem",
        "ALL_PROXY": "http://proxy.invalid:3128",
    }


def test_places_that_are_gone_are_left_out(
    uv_environment: Callable[[dict[str, str]], dict[str, str]], tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    found = uv_environment({"find-links": str(gone), "extra-index-url": f"file://{gone}/simple", "cert": "x"})
    assert found == ALWAYS | {"SSL_CERT_FILE": "x"}
