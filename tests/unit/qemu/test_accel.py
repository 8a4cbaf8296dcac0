"""KVM only where everything speaks for it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.testbeds.bed import need
from understudy.errors import HypervisorError
from understudy_qemu.accel import ODD_BYTES, Accel, build_preload, choose_accel, guest_memory_bytes, kvm_runs


def need_compiler() -> None:
    need("qemu", [] if shutil.which("gcc") else ["the program gcc"])


@pytest.mark.parametrize(
    ("flags", "device", "chosen"),
    [
        ("flags : fpu vmx", True, Accel.KVM),
        ("flags : fpu svm", True, Accel.KVM),
        ("flags : fpu hypervisor", True, Accel.TCG),
        ("flags : fpu vmx", False, Accel.TCG),
    ],
)
def test_auto(tmp_path: Path, flags: str, *, device: bool, chosen: Accel) -> None:
    cpuinfo, kvm = tmp_path / "cpuinfo", tmp_path / "kvm"
    cpuinfo.write_text(flags)
    if device:
        kvm.write_text("")
    assert choose_accel("auto", cpuinfo=cpuinfo, kvm=kvm) is chosen


@pytest.mark.parametrize("wanted", ["kvm", "tcg"])
def test_forced(wanted: str, tmp_path: Path) -> None:
    assert choose_accel(wanted, cpuinfo=tmp_path / "none", kvm=tmp_path / "none") is Accel(wanted)


def test_memory() -> None:
    assert guest_memory_bytes(128 << 20, Accel.TCG) == (128 << 20) + ODD_BYTES
    assert guest_memory_bytes((128 << 20) + 4096, Accel.TCG) == (128 << 20) + 4096
    assert guest_memory_bytes(128 << 20, Accel.KVM) == 128 << 20


async def test_a_trial_with_a_program_that_is_no_qemu() -> None:
    problem = await kvm_runs("/bin/true", "host")
    assert problem


def test_the_library_is_built_once_and_loads(tmp_path: Path) -> None:
    need_compiler()
    library = build_preload(tmp_path)
    built = library.stat().st_mtime_ns
    assert build_preload(tmp_path) == library
    assert library.stat().st_mtime_ns == built
    assert list(tmp_path.iterdir()) == [library]
    assert hasattr(ctypes.CDLL(str(library)), "pthread_cond_wait")


# Waits on a condition with a mutex that another thread owns, as QEMU does, then with one that it owns itself.
PROGRAM = r"""
#include <pthread.h>
#include <stdio.h>
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER, own = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static int set;
static void *setter(void *unused)
{
    pthread_mutex_lock(&own); set = 1; pthread_cond_broadcast(&cond); pthread_mutex_unlock(&own);
    return unused;
}
static void *waiter(void *unused) { pthread_cond_wait(&cond, &lock); return unused; }
int main(void)
{
    pthread_t thread;
    pthread_mutex_lock(&lock);
    pthread_create(&thread, 0, waiter, 0);
    pthread_join(thread, 0); /* for ever, without the library: the waiter takes the lock on its way out */
    pthread_mutex_unlock(&lock);
    pthread_mutex_lock(&own);
    pthread_create(&thread, 0, setter, 0);
    while (!set) pthread_cond_wait(&cond, &own);
    pthread_mutex_unlock(&own);
    pthread_join(thread, 0);
    puts("done");
    return 0;
}
"""


def test_the_library_ends_a_wait_without_the_lock_and_leaves_others_alone(tmp_path: Path) -> None:
    need_compiler()
    (tmp_path / "p.c").write_text(PROGRAM)
    subprocess.run(["gcc", "-pthread", "-o", tmp_path / "p", tmp_path / "p.c"], check=True)
    library = build_preload(tmp_path / "cache")
    done = subprocess.run(
        [tmp_path / "p"], env={"LD_PRELOAD": str(library)}, capture_output=True, timeout=10, check=True
    )
    assert done.stdout == b"done\n"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([tmp_path / "p"], env={}, capture_output=True, timeout=0.5, check=True)


# The other thread's work arrives, with its wakeup, after the look for work and before the sleep.
LOST_WAKEUP = r"""
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>
static pthread_mutex_t big_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t halt = PTHREAD_COND_INITIALIZER, work = PTHREAD_COND_INITIALIZER;
static volatile int looked, queued, done;
static void *virtual_cpu(void *unused)
{
    pthread_mutex_lock(&big_lock);
    while (!queued) {
        if (!looked) {
            looked = 1;
            usleep(200000);
        }
        pthread_cond_wait(&halt, &big_lock);
    }
    done = 1;
    pthread_cond_broadcast(&work);
    pthread_mutex_unlock(&big_lock);
    return unused;
}
int main(void)
{
    pthread_t thread;
    pthread_create(&thread, 0, virtual_cpu, 0);
    while (!looked) usleep(1000);
    queued = 1;
    pthread_cond_broadcast(&halt); /* nobody sleeps yet */
    while (!done) pthread_cond_wait(&work, &big_lock);
    pthread_join(thread, 0);
    puts("done");
    return 0;
}
"""


def test_the_library_makes_up_for_a_wakeup_that_came_too_early(tmp_path: Path) -> None:
    need_compiler()
    (tmp_path / "p.c").write_text(LOST_WAKEUP)
    subprocess.run(["gcc", "-pthread", "-o", tmp_path / "p", tmp_path / "p.c"], check=True)
    library = build_preload(tmp_path / "cache")
    done = subprocess.run(
        [tmp_path / "p"], env={"LD_PRELOAD": str(library)}, capture_output=True, timeout=10, check=True
    )
    assert done.stdout == b"done\n"


def test_no_compiler_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HypervisorError, match="there is no C compiler here"):
        build_preload(tmp_path / "cache")
