"""What becomes of memory that is freed."""

import subprocess
import sys

import pytest

_FREE_AND_TAKE = """
import ctypes, resource, sys
from kpx.runtime.memory import keep_freed

if sys.argv[1] == "kept":
    keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def touch(blocks):
    taken = [libc.malloc(1 << 20) for _ in range(blocks)]
    for block in taken:
        ctypes.memset(block, 1, 1 << 20)
    for block in reversed(taken):
        libc.free(block)

touch(64)
before = faults()
touch(64)
print(faults() - before)
"""


def _faults(policy: str) -> int:
    command = [sys.executable, "-c", _FREE_AND_TAKE, policy]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does, with glibc")
def test_memory_that_is_kept_is_used_again_without_page_faults():
    assert _faults("kept") < 1000
    assert _faults("given back") > 8000  # 64 MiB are 16384 pages
