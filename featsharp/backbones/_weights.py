"""What adapters share about foreign weights and foreign errors."""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from featsharp.errors import CheckpointError


def fill(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load ``state`` into ``module``, which it has to fill exactly.

    Args:
        module: Whose weights are replaced.
        state: Names and tensors.
        source: What the message says about the file, such as "w.pt is not a checkpoint of model x".

    Raises:
        CheckpointError: With the names that are missing, that the module does not have, or of another shape.
    """
    wanted = module.state_dict()
    wrong = {
        "missing": wanted.keys() - state.keys(),
        "not in the model": state.keys() - wanted.keys(),
        "of another shape": {key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape},
    }
    if any(wrong.values()):
        lists = "; ".join(f"{what}: {_some(keys)}" for what, keys in wrong.items() if keys)
        raise CheckpointError(f"{source}; {lists}")
    module.load_state_dict(state, strict=True)


def first_line(error: BaseException) -> str:
    """What a foreign error says, short enough for a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _some(keys: Collection[str], shown: int = 5) -> str:
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(sorted(keys)[:shown]) + more
