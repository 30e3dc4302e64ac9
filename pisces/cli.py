"""The command line: `pisces --help`.

Every command imports what it needs when it runs, so that help is quick. Errors of ours (a missing file, a wrong value,
an unreadable video) are one line on stderr and exit code 2; `pisces --debug COMMAND` shows where they came from.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from pisces import cli_videos

F = TypeVar("F", bound=Callable[..., Any])

app = typer.Typer(
    name="pisces",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with:  pisces doctor, then  pisces demo.   Each command's --help has examples.",
)
world_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(world_app, name="world", help="The small world: captioned videos without end, and the checkpoints.")

_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
}
_debug = False


def _reported(command: F) -> F:
    """Turn an error that the user can mend into one line and exit code 2."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            raise
        except Exception as error:
            if _debug or not _is_ours(error):
                raise
            typer.echo(f"pisces: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None

    return wrapper  # type: ignore[return-value]


def _written(context: typer.Context) -> dict[str, Any]:
    """The options and arguments that the user wrote, by name: not those left at their defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name: context.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _is_ours(error: Exception) -> bool:
    """Whether the message is meant for the user: a bad value or file, a run that cannot go on."""
    own = {cls.__name__ for cls in type(error).__mro__} & {"TrainingError", "CheckpointError", "SafetensorError"}
    return isinstance(error, ValueError | OSError) or bool(own)


@app.callback()
def _pisces(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Post-train text-to-video generators with rewards that are aligned by optimal transport.

    No command uses the network, unless the settings of a training name the tracker wandb. Results go to the files and
    folders that you name, or to those that the command's help gives as the default.
    """
    global _debug
    _debug = debug
    for name, value in _OFFLINE.items():
        os.environ.setdefault(name, value)


@app.command()
@_reported
def demo(
    output: Annotated[Path, typer.Option(help="Folder for videos, pictures, logs and the page.")] = Path("demo-output"),
    full: Annotated[bool, typer.Option("--full", help="Every arm and three seeds instead of the short form.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="The smallest form, for a check of the installation.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds. Default: 1, with --full 3.")] = None,
) -> None:
    """Watch a weak generator of moving shapes get better by OT-aligned rewards, judged by something else.

    Makes captioned videos, fits the OT map, post-trains the packaged weak generator in several arms, has an
    independent judge compare them on held-out captions, and writes index.html with table, curves and pictures.
    A run that was stopped goes on where it was.

    Examples:

      pisces demo

      pisces demo --output /tmp/demo --full
    """
    from pisces.world.demo import run_demo

    page = run_demo(output, full=full, smoke=smoke, seeds=seeds)
    typer.echo(f"Open {page}")


@app.command()
@_reported
def train(
    config: Annotated[str, typer.Argument(help="YAML file of settings, or preset:NAME; see below.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting; repeat as needed.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on from the newest checkpoint, or start anew.")
    ] = True,
) -> None:
    """Post-train a diffusers pipeline as a YAML file says.

    The output folder receives config.yaml, log.jsonl, checkpoints/ and at the end final/: a LoRA for
    load_lora_weights or a whole pipeline directory. Ctrl-C or SIGTERM saves a checkpoint; the same command goes on
    from it, bit for bit. --no-resume deletes what an earlier run left in the output folder. Launched by torchrun or
    accelerate, the processes divide each step's micro-batches among themselves.

    Presets: tiny-wan, tiny-wan-grpo (the small world, from nothing but this package), paper-hunyuan,
    paper-hunyuan-grpo (PISCES' recipes), wan-1.3b.

    Examples:

      pisces train preset:tiny-wan

      pisces train examples/draft.yaml

      pisces train examples/draft.yaml --set steps=20 --set optimizer.lr=1e-4 --set output.dir=runs/short
    """
    from pisces.build import run_training
    from pisces.config import load_config

    result = run_training(load_config(config, settings or []), resume="auto" if resume else "never")
    typer.echo(f"wrote {result}")


@app.command()
@_reported
def encode(
    config: Annotated[Path, typer.Argument(help="YAML file of settings of the training run.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting; repeat as needed.")
    ] = None,
) -> None:
    """Encode the videos and prompts of a training run ahead of it, into the folder data.cache.

    What is there is skipped, so a run that was stopped goes on where it was; training with the same settings then opens
    no video and calls no text encoder. A video that cannot be read is named, counted and skipped, as in training; the
    exit code is then 1.

    Examples:

      pisces encode examples/one_step.yaml --set data.cache=runs/cache
    """
    from pisces.commands.encode import encode as run
    from pisces.config import load_config

    if run(load_config(config, settings or [])):
        raise typer.Exit(1)


@app.command("fit-ot-map")
@_reported
def fit_ot_map(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="The alignment to write, NAME.safetensors.")],
    videos: Annotated[
        Path | None, typer.Option(help="Folder or WebDataset shards of real videos with captions.")
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="Folder that keeps the embeddings; once filled, it replaces --videos.")
    ] = None,
    encoder: Annotated[str, typer.Option(help="Encoder directory.")] = "packaged",
    kind: Annotated[
        str,
        typer.Option(
            help="none, mean_shift, center, affine, procrustes, ridge, barycentric, ot (the paper's map) or center_ot "
            "(centred first)."
        ),
    ] = "center_ot",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the fit; the paper uses 160000.")] = 1000,
    hidden: Annotated[
        int | None, typer.Option(min=1, help="Width of the networks. Default: twice the embedding's, 128 at least.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate; the paper uses 1e-4.")] = 3e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Embeddings a batch.")] = 128,
    cost_weight: Annotated[
        float, typer.Option(help="Weight of the transport cost; the paper uses 1 / width of the embeddings.")
    ] = 1.0,
    objective: Annotated[str, typer.Option(help="Of the trained map: max_min (the paper's) or sinkhorn.")] = "max_min",
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="The paper's --kind, --steps, --hidden, --lr, --batch-size, --cost-weight and --objective.",
        ),
    ] = False,
    choose: Annotated[
        str, typer.Option(help="Which map of a training is kept: the best by r_at_1 (then rho) or rho, or the last.")
    ] = "r_at_1",
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints of a training, which then goes on from there.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also fit every kind that needs no training, and show them all.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Also write a page, NAME.html, and its picture, NAME.png.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split and the fit.")] = 0,
    held_out: Annotated[
        float, typer.Option(help="Share of the captions to measure on; of the rest, the share to choose the map by.")
    ] = 0.2,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1. Default: the first GPU, else the CPU.")] = None,
    embed_batch: Annotated[int, typer.Option(min=1, help="Videos that the encoder sees at a time.")] = 32,
    patience: Annotated[
        float, typer.Option(min=0, help="Hours without a new shard after which other processes are taken for dead.")
    ] = 6,
) -> None:
    """Fit the map that carries text embeddings onto the distribution of real-video embeddings.

    The folder holds metadata.jsonl with one {"file_name": ..., "text": ...} a line, or name.txt beside each name.mp4.
    Unreadable videos and captions without a word are named and left out. The printed metrics are those of the held-out
    share; a warning says when the map makes the reward worse than no map.

    With --embeddings a stopped call goes on where it was, and torchrun's processes divide the videos among themselves;
    one of them fits. With --checkpoints SIGTERM or Ctrl-C saves the training, and the same command goes on from it,
    bit for bit.

    Examples:

      pisces world write /tmp/shapes --n 512

      pisces fit-ot-map --videos /tmp/shapes --output /tmp/map.safetensors

      torchrun --nproc-per-node 8 -m pisces fit-ot-map --videos clips --embeddings runs/clips --output a.safetensors

      pisces fit-ot-map --embeddings runs/clips --paper --checkpoints runs/fit --output map.safetensors
    """
    from pisces.commands.fit_ot_map import FitOptions, refuse_unused
    from pisces.commands.fit_ot_map import fit_ot_map as run
    from pisces.ot_map.alignment import check_kind

    refuse_unused(_written(context), kind)
    run(
        output,
        videos=videos,
        embeddings=embeddings,
        encoder=encoder,
        options=FitOptions(
            kind=check_kind(kind, "fit-ot-map"),
            steps=steps,
            hidden=hidden,
            lr=lr,
            batch_size=batch_size,
            cost_weight=cost_weight,
            objective=objective,  # type: ignore[arg-type]
            choose=choose,  # type: ignore[arg-type]
            checkpoints=checkpoints,
            seed=seed,
            held_out=held_out,
        ),
        paper=paper,
        compare=compare,
        report=report,
        device=device,
        embed_batch=embed_batch,
        patience=3600 * patience,
    )


for _command in cli_videos.COMMANDS:
    app.command()(_reported(_command))


@app.command()
@_reported
def report(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of pisces train; one or more.")],
    output: Annotated[Path | None, typer.Option(help="The page. Default: report.html in the run's folder.")] = None,
) -> None:
    """Draw a training run on one HTML page: curves, videos before and after, alarms, settings.

    The page holds everything itself and needs no network. Several runs are drawn side by side. A run that is still
    going on can be reported, too.

    Examples:

      pisces report runs/draft

      pisces report runs/draft runs/grpo --output compared.html
    """
    from pisces.commands.report import report as run

    typer.echo(f"Open {run(runs, output)}")


@app.command("make-tiny")
@_reported
def make_tiny(
    name: Annotated[
        str,
        typer.Argument(
            help="wan, wan22, wan22-5b, hunyuanvideo, hunyuanvideo15, cogvideox, cogvideox15, ltx or mochi."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="Folder to write; an older pipeline there is replaced.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the weights.")] = 0,
) -> None:
    """Write a tiny text-to-video pipeline with random weights: to try settings before the real one is loaded.

    Every part is of the class that the real pipeline has, and goes through the same loading code. Its videos are noise.

    Examples:

      pisces make-tiny hunyuanvideo /tmp/tiny-hunyuan

      pisces train examples/draft.yaml --set pipeline.path=/tmp/tiny-hunyuan
    """
    from pisces.pipelines.tiny import make_tiny as run

    if folder.exists() and not (folder / "model_index.json").is_file() and any(folder.iterdir()):
        raise ValueError(f"make-tiny: {folder} is not empty and holds no pipeline. Choose another folder.")
    typer.echo(f"wrote {run(name, folder, seed=seed)}")


@app.command()
@_reported
def plan(
    context: typer.Context,
    vae: Annotated[
        str,
        typer.Argument(
            help="Diffusers folder (pipeline or autoencoder), a class such as AutoencoderKLWan, or a run's settings "
            "(.yaml, preset:NAME)."
        ),
    ],
    frames: Annotated[int, typer.Option(min=1, help="Frames of a video.")] = 81,
    height: Annotated[int, typer.Option(min=1, help="Pixels.")] = 480,
    width: Annotated[int, typer.Option(min=1, help="Pixels.")] = 832,
    batch: Annotated[int, typer.Option(min=1, help="Videos that are decoded together.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    tiling: Annotated[bool, typer.Option("--tiling", help="The class's own spatial tiles.")] = False,
    budget: Annotated[
        str | None, typer.Option(help="Memory, such as 24GB: chooses what fits; the exit code is 2 if nothing does.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With settings of a run: replace one.")
    ] = None,
) -> None:
    """Predict the memory of decoding videos with gradient, for every method of pisces.decode, or of a training step.

    Nothing is computed: the operations are run on tensors that have shapes only, at the true size. It takes a minute
    or a few. Of a decode no weights are read. Of a training run the pipeline is read and its text encoders embed the
    prompts of one batch; size, batch and dtype are the settings' own, and replaced by --set.

    Examples:

      pisces plan AutoencoderKLWan --budget 24GB

      pisces plan path/to/pipeline --frames 257 --height 256 --width 256

      pisces plan preset:tiny-wan --set data.batch_size=4
    """
    if vae.startswith("preset:") or vae.endswith((".yaml", ".yml")):
        from pisces.commands.plan import plan_training, refuse_decode_options
        from pisces.config import load_config

        refuse_decode_options(_written(context))
        typer.echo(plan_training(load_config(vae, settings or []), budget=budget))
        return
    if settings:
        raise ValueError(
            f"plan: --set belongs to settings of a run, got {vae!r}, expected a .yaml file or preset:NAME."
        )
    from pisces.commands.plan import plan as run

    typer.echo(
        run(vae, frames=frames, height=height, width=width, batch=batch, dtype=dtype, tiling=tiling, budget=budget)
    )


@app.command()
@_reported
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list instead.")] = False,
) -> None:
    """Say what this installation has and lacks: versions, kernels, checkpoints, codecs, threads, disk.

    The exit code is 1 if something is missing that the commands need.

    Examples:

      pisces doctor
    """
    from pisces.doctor import doctor as run

    if not run(as_json=as_json):
        raise typer.Exit(1)


@world_app.command("write")
@_reported
def world_write(
    folder: Annotated[Path, typer.Argument(help="Folder for the videos and metadata.jsonl.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Number of videos.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="The same seed writes the same videos.")] = 0,
    two_objects: Annotated[float, typer.Option(min=0, max=1, help="Share of videos with two shapes.")] = 0.0,
    split: Annotated[str | None, typer.Option(help="train or held_out combinations. Default: all.")] = None,
) -> None:
    """Write captioned videos of moving shapes: 9 frames of 32x32 pixels.

    Examples:

      pisces world write /tmp/shapes --n 512 --seed 1 --split train
    """
    from pisces.world.dataset import write_dataset

    if split not in (None, "train", "held_out"):
        raise ValueError(f"world write: --split is {split!r}, expected train or held_out.")
    path = write_dataset(folder, n, seed=seed, two_objects=two_objects, split=split)  # type: ignore[arg-type]
    typer.echo(f"wrote {n} videos to {path}")


@world_app.command("train-checkpoints")
@_reported
def world_train_checkpoints(
    output: Annotated[Path, typer.Option(help="Folder.")] = Path("checkpoints-new"),
    only: Annotated[str | None, typer.Option(help="Stages by comma: vae,encoder,wan-good,wan-base.")] = None,
) -> None:
    """Train the packaged checkpoints from nothing: about an hour on two cores, resumable, seeded.

    Stages that are done are skipped; those named by --only are made again. The checkpoints of the installation stay as
    they are.

    Examples:

      pisces world train-checkpoints --output /tmp/checkpoints

      pisces world train-checkpoints --output /tmp/checkpoints --only encoder
    """
    from pisces.world.checkpoints import train_checkpoints

    stages = [stage.strip() for stage in only.split(",") if stage.strip()] if only is not None else None
    train_checkpoints(output, only=stages)


def main() -> None:
    """Entry point of the console script."""
    for name, value in _OFFLINE.items():
        os.environ.setdefault(name, value)
    warnings.formatwarning = lambda message, category, *_: f"pisces: {category.__name__}: {message}\n"
    app()


if __name__ == "__main__":
    main()
