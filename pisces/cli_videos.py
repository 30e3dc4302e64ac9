"""The commands that read or make videos, with their options and help; `pisces.cli` puts them into the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MOST = 128  # videos of which the leverage is measured: all are held in memory

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--transport",
        metavar="KEY=VALUE",
        help="Another setting of the transport, such as rows=mass, as rewards.transport of a training has them; repeat "
        "for more.",
    ),
]


def score(
    videos: Annotated[list[Path] | None, typer.Argument(help="Video files.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video file, too; repeat for more.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder or shards of videos; their captions are the prompts.")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Table of videos and prompts, .csv or .jsonl; names relative to it.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The text; with --folder it replaces the captions.")] = None,
    encoder: Annotated[str, typer.Option(help="Encoder directory.")] = "packaged",
    ot_map: Annotated[Path | None, typer.Option(help="Alignment that fit-ot-map wrote.")] = None,
    vanilla: Annotated[bool, typer.Option("--vanilla", help="No partial transport in the attention.")] = False,
    tau: Annotated[float | None, typer.Option(help="Transport that keeps weights this far; 1 is balanced.")] = None,
    mass: Annotated[float | None, typer.Option(help="Transport of exactly this mass.")] = None,
    transport: Settings = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the scores as JSON.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the scores as CSV.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1. Default: the first GPU, else the CPU.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Videos that the encoder sees at a time.")] = 16,
    with_leverage: Annotated[
        bool, typer.Option("--leverage", help="Also say what pisces leverage says, of 128 videos at most.")
    ] = False,
) -> None:
    """Score videos for a text with both rewards.

    quality is the cosine of the text and video embeddings (after the OT map, if one is given), semantic the
    log-probability that the text matches, with partial transport in the cross-attention; an encoder without a match
    head gives quality alone, and takes none of --vanilla, --tau, --mass and --transport. Of the first three at most one
    is given; without one tau is 0.9. Score by what a model was trained on: --transport rows=mass, say.

    A table has a column `video`, `file` or `file_name` and a column `prompt`, `text` or `caption`; that of --csv can be
    read back.

    A video that cannot be read (missing, cut off, not a video), or whose prompt has no word, is named, counted and
    skipped; the exit code is then 1. It is 0 when every video was scored and 2 for a mistake in the command. The files
    are replaced after every batch, so that a call that is stopped leaves what it has found.

    Examples:

      pisces score clip.mp4 other.mp4 --prompt "a red square moves left"

      pisces score --folder /tmp/shapes --ot-map /tmp/map.safetensors --csv scores.csv

      pisces score --pairs pairs.csv --json scores.json
    """
    from pisces.commands.inputs import Item, choose_transport, folder_items, pair_items
    from pisces.commands.score import score as run

    files = [*(video or []), *(videos or [])]
    if bool(files) + (folder is not None) + (pairs is not None) != 1:
        raise ValueError("score: give either videos (CLIP.mp4 ... or --video), --folder or --pairs.")
    if prompt is not None and not prompt.strip():
        raise ValueError("score: --prompt is empty, expected at least one word.")
    if files and prompt is None:
        raise ValueError("score: videos need --prompt TEXT, the text to score them for.")
    if pairs is not None and prompt is not None:
        raise ValueError("score: --pairs has prompts of its own. Leave --prompt out.")
    for path in files:
        if path.is_dir():
            raise ValueError(f"score: {str(path)!r} is a folder, expected video files. Use --folder.")
    if pairs is not None:
        items = pair_items(pairs)
    else:
        given = folder_items(folder, prompt, "score") if folder is not None else None
        items = given if given is not None else [Item(path, prompt or "") for path in files]
    scores = run(
        items,
        encoder=encoder,
        ot_map=ot_map,
        choice=choose_transport("score", tau=tau, mass=mass, settings=transport, vanilla=vanilla),
        json_file=json_file,
        csv_file=csv_file,
        device=device,
        batch_size=batch_size,
        leverage=MOST if with_leverage else 0,
    )
    if scores.unreadable:
        raise typer.Exit(1)


def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder of captioned videos, such as sample writes.")],
    before: Annotated[Path | None, typer.Option(help="The same of another model, to compare with.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Replaces the captions.")] = None,
    encoder: Annotated[str, typer.Option(help="Encoder directory.")] = "packaged",
    ot_map: Annotated[Path | None, typer.Option(help="Alignment that fit-ot-map wrote.")] = None,
    vanilla: Annotated[bool, typer.Option("--vanilla", help="No partial transport in the attention.")] = False,
    tau: Annotated[float | None, typer.Option(help="Transport that keeps weights this far; 1 is balanced.")] = None,
    mass: Annotated[float | None, typer.Option(help="Transport of exactly this mass.")] = None,
    transport: Settings = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all numbers as JSON.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write each video's numbers as CSV.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1. Default: the first GPU, else the CPU.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Videos that the encoder sees at a time.")] = 16,
) -> None:
    """Measure a folder of videos: rewards, sharpness, saturation, motion, flicker, and the judge where it applies.

    The rewards are those of pisces score, with the same options. With --before the difference is shown with its
    bootstrap interval, paired by file and prompt where most videos of both folders have a partner; the others are left
    out of the difference and counted. A video that cannot be read, or whose caption has no word, is named and left out;
    the exit code is then 1.

    Examples:

      pisces sample --pipeline packaged:wan-base --prompts p.txt --lossless --output /tmp/before

      pisces sample --pipeline runs/draft/final --prompts p.txt --lossless --output /tmp/after

      pisces evaluate /tmp/after --before /tmp/before
    """
    from pisces.commands.evaluate import evaluate as run
    from pisces.commands.inputs import choose_transport

    if prompt is not None and not prompt.strip():
        raise ValueError("evaluate: --prompt is empty, expected at least one word.")
    found = run(
        folder,
        before=before,
        prompt=prompt,
        encoder=encoder,
        ot_map=ot_map,
        choice=choose_transport("evaluate", tau=tau, mass=mass, settings=transport, vanilla=vanilla),
        json_file=json_file,
        csv_file=csv_file,
        device=device,
        batch_size=batch_size,
    )
    if found.after.unreadable or (found.before is not None and found.before.unreadable):
        raise typer.Exit(1)


def explain(
    video: Annotated[Path, typer.Argument(help="A video file.")],
    prompt: Annotated[str, typer.Argument(help="The text.")],
    output: Annotated[Path, typer.Option(help="The page to write, NAME.html; NAME.png is written beside it.")],
    encoder: Annotated[str, typer.Option(help="Encoder directory.")] = "packaged",
    vanilla: Annotated[bool, typer.Option("--vanilla", help="No partial transport in the attention.")] = False,
    tau: Annotated[float | None, typer.Option(help="Transport that keeps weights this far; 1 is balanced.")] = None,
    mass: Annotated[float | None, typer.Option(help="Transport of exactly this mass.")] = None,
    transport: Settings = None,
    layer: Annotated[int | None, typer.Option(help="Fusion layer, from 1. Default: the last.")] = None,
    head: Annotated[int | None, typer.Option(help="Attention head, from 1. Default: the mean of all.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1. Default: the first GPU, else the CPU.")] = None,
) -> None:
    """Draw which patches each word was matched to, frame by frame.

    The page shows transport plan and cross-attention as heat maps over the frames, one row a word, each word's mass,
    and the match probability with and without transport. It holds everything itself and needs no network.

    Examples:

      pisces explain clip.mp4 "a red square moves left" --output why.html

      pisces explain clip.mp4 "a red square moves left" --output why.html --layer 1 --head 2
    """
    from pisces.commands.explain import explain as run
    from pisces.commands.inputs import choose_transport

    if not prompt.strip():
        raise ValueError("explain: PROMPT is empty, expected at least one word.")
    chosen = choose_transport("explain", tau=tau, mass=mass, settings=transport, vanilla=vanilla).transport
    page, _ = run(video, prompt, output, encoder=encoder, transport=chosen, layer=layer, head=head, device=device)
    typer.echo(f"Open {page}")


def leverage(
    folder: Annotated[Path, typer.Option(help="Folder or shards of captioned videos, such as sample writes.")],
    prompt: Annotated[str | None, typer.Option(help="Replaces the captions.")] = None,
    encoder: Annotated[str, typer.Option(help="Encoder directory.")] = "packaged",
    most: Annotated[int, typer.Option(min=2, help="Most videos, evenly spread; all are held in memory.")] = MOST,
    tau: Annotated[float | None, typer.Option(help="Transport that keeps weights this far; 1 is balanced.")] = None,
    mass: Annotated[float | None, typer.Option(help="Transport of exactly this mass.")] = None,
    transport: Settings = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers as JSON.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1. Default: the first GPU, else the CPU.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Videos that the encoder sees at a time.")] = 16,
) -> None:
    """Say whether refining an encoder's attention can change its semantic reward at all.

    Compares how far partial transport, and uniform attention, move the log-odds of a match with their standard
    deviation over the videos. Take videos that match their prompts more and less, such as a generator's samples: real
    ones all match, and their spread means little. A video that cannot be read, or whose prompt has no word, is named
    and left out; the exit code is then 1.

    Examples:

      pisces sample --pipeline packaged:wan-base --prompts p.txt --output /tmp/samples

      pisces leverage --folder /tmp/samples
    """
    from pisces.commands.inputs import choose_transport, folder_items
    from pisces.commands.leverage import leverage as run

    if prompt is not None and not prompt.strip():
        raise ValueError("leverage: --prompt is empty, expected at least one word.")
    chosen = choose_transport("leverage", tau=tau, mass=mass, settings=transport).transport
    _, unreadable = run(
        folder_items(folder, prompt, "leverage"),
        encoder=encoder,
        most=most,
        transport=chosen,
        json_file=json_file,
        device=device,
        batch_size=batch_size,
    )
    if unreadable:
        raise typer.Exit(1)


def sample(
    output: Annotated[Path, typer.Option(help="Folder for the videos.")],
    pipeline: Annotated[str, typer.Option(help="diffusers directory, or packaged:NAME.")] = "packaged:wan-good",
    prompt: Annotated[list[str] | None, typer.Option(help="A text; repeat for more.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of texts: .txt, .jsonl or .csv.")] = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA directory, such as a run's final/.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Video i starts from noise of seed + i.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps. Default: the pipeline's.")] = None,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is off.")] = 1.0,
    guidance_2: Annotated[float | None, typer.Option(help="Of Wan 2.2's second expert. Default: --guidance.")] = None,
    n_frames: Annotated[int | None, typer.Option(min=1, help="Frames. Default: the pipeline's.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: the pipeline's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: the pipeline's.")] = None,
    fps: Annotated[float | None, typer.Option(help="Pictures a second. Default: the pipeline's, or 8.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Videos at a time.")] = 8,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1. Default: the first GPU, else the CPU.")] = None,
    names: Annotated[str, typer.Option(help="number (0000.mp4) or vbench (videos/PROMPT-0.mp4).")] = "number",
    per_prompt: Annotated[int, typer.Option(min=1, help="Videos of each prompt; VBench wants 5.")] = 1,
    lossless: Annotated[bool, typer.Option("--lossless", help="Exact pixels, to be measured by evaluate.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what a stopped call with the same options made.")
    ] = False,
) -> None:
    """Make videos with a generator.

    Writes 0000.mp4, 0001.mp4, ... for any player, contact-sheet.png, prompts.jsonl (text, file, seed and settings of
    each), and metadata.jsonl, which makes the folder one that score, evaluate and fit-ot-map read. With --names vbench
    the folder videos/ is what VBench's evaluator takes as --videos_path.

    Examples:

      pisces sample --output /tmp/videos --prompt "a red square moves left" --guidance 2.5

      pisces sample --pipeline packaged:wan-base --lora runs/pisces/final --prompts prompts.txt --output /tmp/after

      pisces sample --prompts vbench.txt --names vbench --per-prompt 5 --output /tmp/vbench --resume
    """
    from pisces.commands.sample import sample as run
    from pisces.data import read_prompts

    if bool(prompt) == (prompts is not None):
        raise ValueError("sample: give either --prompt (once or more) or --prompts FILE.")
    texts = read_prompts(prompts) if prompts is not None else [text.strip() for text in prompt or []]
    if not all(texts):
        raise ValueError("sample: --prompt is empty, expected at least one word.")
    files = run(
        texts,
        output,
        pipeline=pipeline,
        lora=lora,
        seed=seed,
        steps=steps,
        guidance=guidance,
        guidance_2=guidance_2,
        n_frames=n_frames,
        height=height,
        width=width,
        fps=fps,
        batch_size=batch_size,
        device=device,
        names=names,
        per_prompt=per_prompt,
        lossless=lossless,
        resume=resume,
    )
    typer.echo(f"wrote {len(files)} videos to {output}, see {output / 'contact-sheet.png'}")


COMMANDS = (score, evaluate, explain, leverage, sample)
