"""The command line: arguments in, public API out.

Exit status: 0; 1 if the written files fail their check; 2 for bad input, with one line on stderr;
130 on Ctrl-C, 143 on SIGTERM. Under torchrun each process prints its own line, and the first the
report.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_init import LoraInitError
from lora_init.adapters import describe, export_adapter
from lora_init.cache import Cache, default_directory
from lora_init.methods import methods
from lora_init.staging import CheckFailed

app = typer.Typer(
    help="LoRA starts that approximate the weight, for whole checkpoints.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
cache_app = typer.Typer(help="What was kept from earlier runs: factors, and statistics of data.")
app.add_typer(cache_app, name="cache")

Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="New or empty directory.")]
CacheDirectory = Annotated[
    Path | None,
    typer.Option("--cache-dir", metavar="DIR", help="Instead of the user's cache directory."),
]


@app.command()
def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Directory with safetensors weights, or a downloaded hub id."
        ),
    ],
    out: Out,
    method: Annotated[str, typer.Option(help="One of `lora-init methods`.")] = "inilora",
    r: Annotated[int, typer.Option("-r", help="Rank.")] = 8,
    alpha: Annotated[int | None, typer.Option(help="LoRA alpha.", show_default="r")] = None,
    rslora: Annotated[
        bool, typer.Option("--rslora", help="Scale by alpha/√r, not alpha/r.")
    ] = False,
    target_modules: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Module name endings, or all-linear.", show_default="PEFT's choice"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Same as --option steps=N.")] = None,
    solver: Annotated[str | None, typer.Option(help="Same as --option solver=NAME.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Option of the method, as JSON; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides every random draw.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    residual: Annotated[
        Literal["save", "none"],
        typer.Option(help="none: write no residual model, for use with lora_init.resume."),
    ] = "save",
    auto_class: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Such as AutoModelForCausalLM.",
            show_default="the config's architecture",
        ),
    ] = None,
    cache_dir: CacheDirectory = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Neither read nor write it.")
    ] = False,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Load original and result with stock libraries and compare their outputs.",
            show_default="if under 4 GB in fp32",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run's outputs.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on where such a run to DIR was killed, if there was one."
        ),
    ] = False,
    group_bytes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Memory for the weights that are solved at once.",
            show_default="512 MiB, half of a GPU",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON and nothing else.")
    ] = False,
) -> None:
    """Initialise a checkpoint: DIR gets adapter/, residual/, report.json and report.png."""
    from lora_init.integrations.checkpoint import OUTPUTS, initialize_checkpoint

    options = _parse_options(option or [])
    for name, value in (("steps", steps), ("solver", solver)):
        if value is not None and options.setdefault(name, value) != value:
            raise LoraInitError(f"--{name} {value} and --option {name}={options[name]} differ")
    with _stoppable(), _job() as first:
        report = initialize_checkpoint(
            model,
            out,
            method,
            r=r,
            lora_alpha=alpha,
            use_rslora=rslora,
            target_modules=_parse_modules(target_modules),
            seed=seed,
            device=device,
            save_residual=residual == "save",
            auto_class=auto_class,
            check=check,
            overwrite=overwrite,
            cache=False if no_cache else cache_dir or "auto",
            resume=resume,
            group_bytes="auto" if group_bytes is None else group_bytes,
            **options,
        )
    if not first:
        return
    if as_json:
        print(json.dumps(report.to_dict()))
        return
    print(report)
    for path in (out / name for name in OUTPUTS):
        if path.exists():
            print(path)


@app.command("methods")
def list_methods() -> None:
    """List the initialisers: what data they need, and what the base weight W becomes."""
    rows = [("method", "needs", "base", "source", "what it starts from")]
    rows += [(name, x.needs, x.base, x.source, x.summary) for name, x in methods().items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Of a run or an adapter.")],
) -> None:
    """Say what a run's output, a checkpoint or an adapter is."""
    print(describe(directory))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Of a trained adapter.")],
    out: Out,
    initial: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The run's adapter/, if it moved away from its residual/."
        ),
    ] = None,
) -> None:
    """Write a trained adapter as plain LoRA for the original base model."""
    print(export_adapter(checkpoint, out, initial))


@cache_app.command()
def info(cache_dir: CacheDirectory = None) -> None:
    """Say where the cache is and how large."""
    cache = Cache(cache_dir or default_directory())
    print(f"{cache.directory}: {len(cache.files())} entries, {cache.size() / 1e6:.1f} MB")


@cache_app.command()
def clear(cache_dir: CacheDirectory = None) -> None:
    """Remove everything in the cache."""
    cache = Cache(cache_dir or default_directory())
    print(f"{cache.directory}: removed {cache.clear()} entries")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            status = app(arguments, prog_name="lora-init", standalone_mode=False)
        except typer.TyperException as error:  # of usage
            return _fail(f"{error.format_message()} (see lora-init --help)", 2)
        except (LoraInitError, OSError) as error:
            return _fail(error, 2)
        except CheckFailed as error:
            return _fail(error, 1)
        except _Stopped as stopped:
            return _fail(stopped, stopped.status)
    if status == 130:
        return _fail("interrupted", 130)
    return status or 0


class _Terminated(BaseException):
    """SIGTERM arrived."""


class _Stopped(Exception):
    """A run was ended by a signal; its notes say what is left of it."""

    def __init__(self, what: str, status: int):
        super().__init__(what)
        self.status = status


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM (which torchrun sends to the ranks that are left when one dies) end what
    is inside as an exception does.
    """

    def terminate(*_: Any) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (KeyboardInterrupt, _Terminated) as signalled:
        interrupted = isinstance(signalled, KeyboardInterrupt)
        stopped = _Stopped(*(("interrupted", 130) if interrupted else ("terminated", 143)))
        for note in getattr(signalled, "__notes__", ()):
            stopped.add_note(note)
        raise stopped from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _job() -> Iterator[bool]:
    """The job of several processes that torchrun started this one in, if it did; yields whether
    this is its first process.
    """
    import torch.distributed as dist

    from lora_init.distributed import PATIENCE

    # Clusters set WORLD_SIZE for single commands too, whose other ranks would never come.
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield True
        return
    # Ranks wait for the slowest one, and for the first to check the outputs.
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name in options:
            raise LoraInitError(f"--option {pair}: must be KEY=VALUE, each key once")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _parse_modules(text: str | None) -> list[str] | str | None:
    if text is None or text == "all-linear":
        return text
    return [part.strip() for part in text.split(",")]


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"lora-init: warning: {_one_line(message)}", file=sys.stderr)


def _fail(message: object, status: int) -> int:
    whole = "; ".join([str(message), *getattr(message, "__notes__", ())])
    print(f"lora-init: {_one_line(whole)}", file=sys.stderr)
    return status


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
