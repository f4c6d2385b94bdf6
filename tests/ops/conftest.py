"""What several tests of operations need."""

import pytest

from featsharp.ops import blocks


@pytest.fixture
def scratch_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every use of scratch memory by the bytes that its owner then holds."""
    taken: list[int] = []
    original = blocks.Scratch.__call__

    def spy(self, name, *shape):
        buffer = original(self, name, *shape)
        taken.append(sum(b.nbytes for b in self._buffers.values()))
        return buffer

    monkeypatch.setattr(blocks.Scratch, "__call__", spy)
    return taken
