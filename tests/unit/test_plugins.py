"""Loading plugins: one by one, named, in an order that is data."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from understudy.device import Kind, Mode, OpenContext, ProtectedDevice, Subkind
from understudy.errors import PluginError
from understudy.hookspecs import HypervisorOffer, IntervalOffer, ObserverOffer, hookimpl
from understudy.interval import Fixed
from understudy.plugins import PluginInfo, Plugins
from understudy.report import Observer


async def open_nothing(context: OpenContext) -> ProtectedDevice | None:
    return None


def subkind(name: str, priority: int = 50) -> Subkind:
    return Subkind(name, Kind.DISK, frozenset(Mode), open_nothing, priority=priority)


class Offers:
    """A plugin that offers subkinds."""

    def __init__(self, *offers: Any) -> None:
        self.offers = offers

    @hookimpl
    def understudy_subkinds(self) -> Iterable[Subkind]:
        return self.offers


def info(name: str) -> PluginInfo:
    return PluginInfo(name, f"dist-{name}", "1", f"{name}_module")


def plugins_of(**plugins: object) -> Plugins:
    made = Plugins()
    for name, plugin in plugins.items():
        made.add(plugin, info(name))
    return made


# --- What is offered ---


def test_offers_are_sorted_by_priority_and_name() -> None:
    a, b = Offers(subkind("z", 10), subkind("b")), Offers(subkind("a"))
    names = [each.name for each in plugins_of(a=a, b=b).subkinds()]
    assert names == ["z", "a", "b"]
    assert [each.name for each in plugins_of(b=b, a=a).subkinds()] == names


def test_two_of_one_name_are_an_error_that_names_both() -> None:
    plugins = plugins_of(one=Offers(subkind("drbd")), two=Offers(subkind("drbd")))
    with pytest.raises(PluginError) as caught:
        plugins.subkinds()
    assert "one (dist-one)" in str(caught.value) or "two (dist-two)" in str(caught.value)
    assert {"one", "two"} == {caught.value.plugin, "two" if caught.value.plugin == "one" else "one"}


def test_a_plugin_that_fails_when_asked_stops_the_session_and_is_named() -> None:
    class Fails:
        @hookimpl
        def understudy_subkinds(self) -> Iterable[Subkind]:
            raise KeyError("x")

    with pytest.raises(PluginError, match=r"plugin bad \(distribution dist-bad\): .*KeyError"):
        plugins_of(bad=Fails(), good=Offers(subkind("a"))).subkinds()


@pytest.mark.parametrize("offers", [["drbd"], [HypervisorOffer("x", lambda _: None)]])  # type: ignore[arg-type,return-value]
def test_what_is_no_offer_is_refused(offers: list[Any]) -> None:
    with pytest.raises(PluginError, match="expected Subkind"):
        plugins_of(bad=Offers(*offers)).subkinds()


def test_no_offer_at_all_is_fine() -> None:
    class Quiet:
        @hookimpl
        def understudy_subkinds(self) -> Iterable[Subkind] | None:
            return None

    assert plugins_of(quiet=Quiet()).subkinds() == ()


def test_elsewhere_a_failing_plugin_is_left_out_and_the_others_work(caplog: pytest.LogCaptureFixture) -> None:
    class Fails:
        @hookimpl
        def understudy_hypervisors(self) -> Iterable[HypervisorOffer]:
            raise OSError("no libvirt")

        @hookimpl
        def understudy_observers(self) -> Iterable[ObserverOffer]:
            yield ObserverOffer("late", Observer)
            raise OSError("half-way")

    class Works:
        @hookimpl
        def understudy_hypervisors(self) -> Iterable[HypervisorOffer]:
            return [HypervisorOffer("qemu", lambda _: None)]  # type: ignore[arg-type,return-value]

    plugins = plugins_of(bad=Fails(), good=Works())
    assert [each.name for each in plugins.hypervisors()] == ["qemu"]
    assert plugins.observers() == ()
    assert plugins.arbiters() == ()
    assert plugins.commands() == ()
    assert plugins.hypervisors()  # asked again: told once
    assert [(each.name, "no libvirt" in each.problem) for each in plugins.problems] == [
        ("bad", True),
        ("bad", False),
    ]
    assert caplog.text.count("no libvirt") == 1


def test_everything_names_the_plugin_of_each_offer() -> None:
    class Many:
        @hookimpl
        def understudy_intervals(self) -> Iterable[IntervalOffer]:
            return [IntervalOffer("slow", lambda _: Fixed(1000))]

    plugins = plugins_of(disks=Offers(subkind("drbd")), pace=Many())
    assert [(each.offer.name, each.plugin.name) for each in plugins.everything()] == [
        ("drbd", "disks"),
        ("slow", "pace"),
    ]


# --- What is refused at the door ---


def test_a_misspelt_hook_is_this_plugins_error() -> None:
    class Misspelt:
        @hookimpl
        def understudy_subkind(self) -> Iterable[Subkind]:
            return ()

    plugins = plugins_of(good=Offers(subkind("a")))
    with pytest.raises(PluginError, match="understudy_subkind"):
        plugins.add(Misspelt(), info("bad"))
    assert [each.name for each in plugins.infos] == ["good"]
    assert plugins.subkinds()
    plugins.add(Offers(subkind("b")), info("next"))


def test_arguments_that_do_not_exist_are_refused() -> None:
    class Wrong:
        @hookimpl
        def understudy_subkinds(self, guest: str) -> Iterable[Subkind]:
            return ()

    with pytest.raises(PluginError, match="guest"):
        Plugins().add(Wrong(), info("bad"))


def test_wrappers_are_refused() -> None:
    class Wrapper:
        @hookimpl(wrapper=True)
        def understudy_subkinds(self) -> Any:
            return (yield)

    plugins = Plugins()
    with pytest.raises(PluginError, match="wrappers are not called"):
        plugins.add(Wrapper(), info("bad"))
    assert plugins.subkinds() == ()


def test_a_name_that_is_taken_is_refused_with_the_one_who_has_it() -> None:
    plugins = plugins_of(a=Offers())
    with pytest.raises(PluginError, match=r"taken by the distribution dist-a \(a_module\)"):
        plugins.add(Offers(), info("a"))
    plugin = Offers()
    plugins.add(plugin, info("b"))
    with pytest.raises(PluginError):
        plugins.add(plugin, info("c"))
    assert [each.name for each in plugins.infos] == ["a", "b"]


# --- Discovery ---


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on sys.path in which distributions can be installed."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("fake_"):
            del sys.modules[name]


def install(site: Path, name: str, source: str, *, distribution: str = "") -> None:
    module = f"fake_{name}_{len(list(site.iterdir()))}"
    (site / f"{module}.py").write_text(source)
    meta = site / f"{(distribution or 'dist-' + name).replace('-', '_')}-2.5.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution or 'dist-' + name}\nVersion: 2.5\n"
    )
    (meta / "entry_points.txt").write_text(f"[understudy]\n{name} = {module}\n")


GOOD = """
from understudy import Kind, Mode, Subkind, hookimpl

async def open_nothing(context):
    return None

@hookimpl
def understudy_subkinds():
    return [Subkind("{name}", Kind.DISK, frozenset(Mode), open_nothing)]
"""


def ours(plugins: Plugins) -> dict[str, PluginInfo]:
    return {each.name: each for each in plugins.infos if each.distribution.startswith("dist")}


def test_plugins_load_one_by_one_with_their_provenance(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    install(site, "good", GOOD.format(name="sample"))
    install(site, "broken", "import no_such_module_anywhere")
    install(site, "misspelt", GOOD.format(name="x").replace("_subkinds", "_subkindz"))
    plugins = Plugins.discover(["good", "broken", "misspelt"])
    seen = ours(plugins)
    good = seen["good"]
    assert (good.distribution, good.version, good.problem) == ("dist-good", "2.5", "")
    assert Path(good.file).parent == site
    assert "No module named 'no_such_module_anywhere'" in seen["broken"].problem
    assert "understudy_subkindz" in seen["misspelt"].problem
    assert [each.name for each in plugins.subkinds()] == ["sample"]
    assert "plugin broken (distribution dist-broken) is left out" in caplog.text


def test_what_is_not_allowed_is_not_even_imported(site: Path) -> None:
    mark = site / "imported"
    install(site, "evil", f"open({str(mark)!r}, 'w').close()")
    plugins = Plugins.discover(["good"])
    assert not mark.exists()
    assert not ours(plugins)["evil"].allowed
    assert [(each.name, each.problem) for each in plugins.problems] == [
        ("good", "allowed by the configuration, but not installed")
    ]
    Plugins.discover(["evil"])
    assert mark.exists()


def test_the_cores_own_are_always_there_and_cannot_be_replaced(site: Path) -> None:
    install(site, "builtin", GOOD.format(name="x"), distribution="aaa")
    plugins = Plugins.discover(["builtin"])
    assert {each.name for each in plugins.intervals()} == {"fixed", "adaptive"}
    assert [each.name for each in plugins.arbiters()] == ["directory"]
    [problem] = plugins.problems
    assert (problem.name, problem.distribution) == ("builtin", "aaa")
    assert "taken by the distribution understudy" in problem.problem


def test_two_plugins_of_one_name_are_told_with_both_distributions(site: Path) -> None:
    install(site, "twin", GOOD.format(name="x"), distribution="dist-b")
    install(site, "twin", GOOD.format(name="y"), distribution="dist-a")
    plugins = Plugins.discover(["twin"])
    [problem] = plugins.problems
    assert problem.distribution == "dist-b"
    assert "dist-a" in problem.problem
    assert [each.name for each in plugins.subkinds()] == ["y"]


def test_an_entry_point_without_a_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    point = SimpleNamespace(name="bare", value="m", module="m", dist=None, load=lambda: Offers(subkind("a")))
    plugins = Plugins()
    plugins._load(point, allowed=True)  # type: ignore[arg-type]
    [loaded] = plugins.infos
    assert (loaded.distribution, loaded.version, loaded.file) == ("?", "?", "")
