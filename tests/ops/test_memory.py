"""The allocator setting, in a process of its own because it cannot be taken back."""

import platform
import subprocess
import sys

CODE = "from featsharp.ops.memory import keep_freed_memory; print(keep_freed_memory(), keep_freed_memory())"


def test_the_allocator_takes_the_settings_where_it_is_glibc():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    glibc = sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"
    assert result.stdout.split() == [str(glibc)] * 2
