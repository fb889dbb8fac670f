"""What the commands share: options read from text, and exceptions that become one line."""

import functools
from collections.abc import Callable
from typing import Any

import click

DTYPES = ("bfloat16", "float32", "float16")
# What a verb that Ctrl-C ends leaves behind, where that is something.
_KEPT = {
    "tune": "what was measured is kept, and the same command goes on",
    "kernels": "what was compiled is kept, and the same command goes on",
    "demo": "start it again with another --out",
}
EXPECTED = (ValueError, TypeError, RuntimeError, OSError, ImportError, MemoryError)


class Interrupted(click.ClickException):
    """Ctrl-C, as one line and the exit status that shells give it."""

    exit_code = 130


def sentence(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the package's exceptions into click's one-line errors (exit status 1), and Ctrl-C too (130)."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except EXPECTED as error:
            text = str(error).strip() or type(error).__name__
            raise click.ClickException(" ".join(text.split())) from None
        except KeyboardInterrupt:
            verb = str(click.get_current_context().info_name)
            kept = _KEPT.get(verb, "nothing was written; start it again")
            raise Interrupted(f"{verb}: interrupted; {kept}.") from None

    return run


def parse_device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: expected auto, cpu or cuda[:N], got {name!r}.") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected auto, cpu or cuda[:N], got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: torch sees {torch.cuda.device_count()} CUDA devices here, got {name!r}.")
    return device


def dtype_of(name: str) -> Any:
    import torch

    return getattr(torch, name)


def set_threads(count: int | None) -> None:
    import torch

    if count is not None:
        torch.set_num_threads(count)


def words(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    return default if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(option: str, text: str | None, default: tuple[int, ...], count: int | None = None) -> tuple[int, ...]:
    found = words(text, tuple(str(number) for number in default))
    if not all(word.isascii() and word.isdigit() for word in found) or (count is not None and len(found) != count):
        wanted = f"{count} comma-separated integers" if count else "comma-separated integers"
        raise ValueError(f"--{option}: expected {wanted}, got {text!r}.")
    return tuple(int(word) for word in found)
