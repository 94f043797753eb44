"""Evaluates a converted model on an annotated folder of clips, as published: by a score, and the best 50 re-ranked.

`python -m experiments.evaluate_clips converted --config msrvtt --annotations test.json --videos videos \\
    --vocabulary bert-base-uncased/vocab.txt` writes `results.md` and `results.json`, which also names the clips that
lack something, were dropped or could not be read, to `converted-evaluation-msrvtt`.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from experiments import report
from experiments.cli import interrupts_end_at_once, one_line_errors, removed_if_interrupted
from experiments.embed import SCORES
from experiments.encoding import Loaded, Matcher, embed_items, everywhere, matched_modalities
from experiments.galleries import ClipGallery, clip_gallery, read_gram_config
from experiments.usage import read_usage
from gramjax._locks import exclusive
from gramjax.data import clips
from gramjax.data.wordpiece import WordPieceTokenizer
from gramjax.evaluation import TwoStageRetrieval, two_stage_retrieval
from gramjax.models import GramModel, to_json

Modality = Literal["vision", "audio", "subtitle", "depth"]
# What the published code encodes of a clip without sound, or in which nothing is said: zeros, and an empty text.
SILENT = ("audio", "subtitle")


@dataclasses.dataclass(frozen=True)
class EvaluateClips:
    """Evaluate a model on a folder of clips with annotations."""

    model: tyro.conf.Positional[Path]
    """Folder that `experiments.convert` wrote."""
    annotations: Path
    """JSON file that says which clips there are, their captions and their classes."""
    vocabulary: Path
    """The model's vocab.txt or tokenizer.json, or a folder with one."""
    config: Literal["msrvtt", "didemo", "activitynet", "vatex", "audiocaps", "clotho", "vggsound", "vast"] | None = None
    """Data set whose published evaluation this is: modalities, frames, slices, lengths of texts. Default: the one that
    the model was trained on, if its folder says so."""
    videos: Path | None = None
    """Folder of videos."""
    audios: Path | None = None
    """Folder of sound files; default: the sound of the videos."""
    depths: Path | None = None
    """Folder of depth maps."""
    output: Path | None = None
    """Folder for the results; default: MODEL-evaluation-CONFIG beside the model's."""
    modalities: tuple[Modality, ...] | None = None
    """Of clips; default: those of the data set that clips and model have (with --absent silence: also sound and
    subtitles that no clip has)."""
    match: tuple[Modality, ...] | None = None
    """What the matching head reads, in this order; default: what it was trained on, if the model's folder says so, or
    vision and audio."""
    score: Literal["volume", "residual", "cone", "leading_direction", "cosine"] = "volume"
    """Of the first stage; volume as published. By volume, clips that lack a modality are found late or never."""
    candidates: int = 50
    """How many of the best the second stage re-ranks; all, where there are fewer."""
    captions: Literal["all", "first"] = "all"
    """All captions of a clip, or the first alone as the published loader."""
    require: tuple[Modality, ...] = ()
    """Drop clips without a file for these; the published loader drops those without vision or audio."""
    absent: Literal["masked", "silence"] = "masked"
    """Clips without sound or subtitles: compared and matched by the rest alone (masked), or, as published, with the
    embeddings of silence and of an empty text (silence), even if no clip has any. What else a clip lacks is masked."""
    frames: int | None = None
    """Frames of a clip; default: the model's if it was trained on this data set, else the data set's."""
    slices: int | None = None
    """Slices of sound; default: as of frames."""
    slice_frames: int | None = None
    """Length of a slice, in frames of 10 ms; default: the model's, or 1024."""
    mel_bins: int | None = None
    """Of sound; default: the model's, or 64."""
    batch_size: int = 16
    """Clips and captions that all devices together embed at a time."""

    def __post_init__(self):
        for name in ("candidates", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A folder of clips through a model, ready to be compared with texts.

    Attributes:
      model: the model.
      gallery: how clips are read, and with them texts.
      vectors: `[clips, modalities, dim]`.
      where: `[clips, modalities]`, which are present.
      matcher: of the second stage.
      options: the rest.
    """

    model: GramModel
    gallery: ClipGallery
    vectors: np.ndarray
    where: np.ndarray
    matcher: Matcher
    options: EvaluateClips

    def compare(
        self, texts: Sequence[str], text_ids: Sequence[int], chosen: Sequence[int], chosen_ids: Sequence[int]
    ) -> TwoStageRetrieval:
        """Both stages between some texts and some of the clips; those with the same id belong together."""
        options = self.options
        tokens = WordPieceTokenizer(options.vocabulary)(list(texts), self.gallery.config.caption_length)
        batches = _progress(_text_batches(tokens, options.batch_size), len(texts), options.batch_size, "texts")
        vectors, _ = embed_items(self.model, batches, ("caption",))
        rows = np.asarray(chosen)
        with tqdm(total=2 * len(rows), desc="re-ranking", unit="clip", disable=None) as progress:

            def condition_of(number: int) -> Any:
                progress.update()
                return self.matcher.condition_of(int(rows[number]))

            return two_stage_retrieval(
                jnp.asarray(vectors[:, 0]),
                jnp.asarray(self.vectors[rows]),
                self.matcher.match,
                tokens,
                condition_of,
                text_ids=jnp.asarray(text_ids, jnp.int32),
                item_ids=jnp.asarray(chosen_ids, jnp.int32),
                item_where=jnp.asarray(self.where[rows]),
                score=SCORES[options.score],
                k=options.candidates,
            )


def evaluate(options: EvaluateClips) -> dict[str, Any]:
    """Reads, embeds and compares everything; what is written to `results.json`.

    Raises:
      ValueError: if anything that was named does not fit the others, or no clip can be read.
    """
    folder = clips.ClipFolder(
        options.annotations,
        videos=options.videos,
        audios=options.audios,
        depths=options.depths,
        captions=options.captions,
        require={"caption", *options.require},
    )
    config = read_gram_config(options.model)
    if "caption" not in config.modalities:
        raise ValueError(f"model must embed captions, got one of {', '.join(config.modalities)}")
    always = SILENT if options.absent == "silence" else ()
    gallery = clip_gallery(config, folder, _wanted(options), vocabulary=options.vocabulary, always=always)
    match_with = matched_modalities(config, gallery.modalities, options.match or read_usage(options.model).condition)
    with _conditions(_output(options)) as conditions:
        # Last, as it may be large and what was asked for impossible.
        model = gallery.load(options.model, shardings=everywhere)
        batches = gallery.batches(folder, options.batch_size)
        batches = _silenced(batches) if options.absent == "silence" else batches
        batches = _progress(batches, len(folder), options.batch_size, "clips")
        modalities = gallery.modalities
        vectors, where = embed_items(model, batches, modalities, match_with=match_with, conditions=conditions)
        if not where.any():
            reasons = [reason for found in folder.report.unreadable.values() for reason in found.values()]
            raise ValueError(f"none of {len(folder)} clips can be read; the first: {reasons[0]}")
        embedded = Embedded(model, gallery, vectors, where, Matcher(model, conditions), options)
        figures = {"retrieval": _retrieval(embedded, folder), "classification": _classification(embedded, folder)}
    lacking = {
        name: len(folder.report.missing[name]) + len(folder.report.unreadable.get(name, ())) for name in modalities
    }
    return {
        "model": str(options.model),
        "config": gallery.config.name,
        "clips": len(folder),
        "present": {name: len(folder) - count for name, count in lacking.items()},
        "absent": options.absent,
        "score": options.score,
        "candidates": options.candidates,
        "match": list(match_with),
        **{name: found for name, found in figures.items() if found},
        "read_as": to_json(gallery.config),
        "report": folder.report.summary(),
        **{name: getattr(folder.report, name) for name in ("missing", "unreadable", "dropped", "duplicates")},
        "jax_version": jax.__version__,
    }


def _retrieval(embedded: Embedded, folder: clips.ClipFolder) -> dict[str, Any]:
    """All captions and all clips; nothing where the only captions are the names of classes, which many clips share."""
    if all(clip.captions == (clip.label,) for clip in folder.annotations):
        return {}
    captions = [(text, number) for number, clip in enumerate(folder.annotations) for text in clip.captions]
    texts, numbers = [text for text, _ in captions], [number for _, number in captions]
    everything = range(len(folder))
    return {"captions": len(captions), **embedded.compare(texts, numbers, everything, everything).figures()}


def _classification(embedded: Embedded, folder: clips.ClipFolder) -> dict[str, Any]:
    """The clips that have a label, and the names of all classes."""
    classes = clips.class_names(folder)
    labels = {number: classes.index(clip.label) for number, clip in enumerate(folder.annotations) if clip.label}
    if not labels:
        return {}
    ranks = embedded.compare(classes, range(len(classes)), list(labels), list(labels.values())).item_to_text
    stages = {stage: {f"top-{k}": found[f"recall@{k}"] for k in (1, 5)} for stage, found in ranks.figures().items()}
    return {"classes": len(classes), "clips": len(labels), **stages}


def markdown(results: dict[str, Any]) -> str:
    """`results.md`."""
    clips_read = ", ".join(f"{count} {name}" for name, count in results["present"].items())
    silence = " and silence in the place of absent sound and subtitles" if results["absent"] == "silence" else ""
    parts = [
        f"# {results['config']}: {results['clips']} clips",
        f"Model {results['model']}; clips with {clips_read}{silence}. "
        f"First stage by {results['score']}; second: the best {results['candidates']} in the order of the matching "
        f"head, which reads {' and '.join(results['match'])}.",
    ]
    stages = ("first stage", "second stage")
    if "retrieval" in results:
        figures = results["retrieval"]
        rows = [
            [
                title,
                stage,
                *(f"{100 * figures[way][stage][f'recall@{k}']:.1f}" for k in (1, 5, 10)),
                f"{figures[way][stage]['median rank']:g}",
            ]
            for way, title in (("text_to_item", "text → clip"), ("item_to_text", "clip → text"))
            for stage in stages
        ]
        parts.append(f"Recall in per cent, {figures['captions']} captions; ties count against.")
        parts.append(report.table(["direction", "stage", "R@1", "R@5", "R@10", "median rank"], rows))
    if "classification" in results:
        figures = results["classification"]
        rows = [[stage, *(f"{100 * figures[stage][f'top-{k}']:.1f}" for k in (1, 5))] for stage in stages]
        parts.append(f"Zero-shot accuracy in per cent, {figures['clips']} clips of {figures['classes']} classes.")
        parts.append(report.table(["stage", "top-1", "top-5"], rows))
    if results["report"]:
        parts.append(f"Data: {results['report']}; results.json names them.")
    return "\n\n".join(parts) + "\n"


def main(options: EvaluateClips) -> None:
    results = evaluate(options)
    text = markdown(results)
    output = _output(options)
    (output / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (output / "results.md").write_text(text, encoding="utf-8")
    print(text)
    print("Written:", output / "results.json", output / "results.md", sep="\n  ")


def _wanted(options: EvaluateClips) -> clips.ClipConfig:
    trained_on = read_usage(options.model).clips
    name = _data_set(options)
    config = trained_on if trained_on.name == name else next(one for one in clips.PUBLISHED if one.name == name)
    # What a slice of sound is belongs to the model, whatever the data set.
    config = dataclasses.replace(config, slice_frames=trained_on.slice_frames, mel_bins=trained_on.mel_bins)
    asked = {
        "modalities": options.modalities,
        "eval_frames": options.frames,
        "audio_slices": options.slices,
        "slice_frames": options.slice_frames,
        "mel_bins": options.mel_bins,
    }
    return dataclasses.replace(config, **{name: value for name, value in asked.items() if value is not None})


def _data_set(options: EvaluateClips) -> str:
    name = options.config or read_usage(options.model).clips.name
    names = [config.name for config in clips.PUBLISHED]
    if name not in names:
        raise ValueError(
            f"config must be one of {', '.join(names)}: {options.model} does not say what it was trained on"
        )
    return name


def _output(options: EvaluateClips) -> Path:
    # Not in the model's folder, which is replaced as a whole when the model is exported or converted again.
    model = Path(os.path.abspath(options.model))
    output = options.output or model.with_name(f"{model.name}-evaluation-{_data_set(options)}")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output must be a folder to write to, got {output}: {error.strerror}") from error
    return output


@contextlib.contextmanager
def _conditions(output: Path) -> Iterator[Path]:
    """A folder for what texts are matched with, in that of the results; what a killed evaluation left goes first."""
    folder = output / ".conditions"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive(output / ".lock", wait=False))
        except BlockingIOError as error:
            raise ValueError(f"output {output} is being written to by another evaluation; choose another") from error
        except OSError as error:
            raise ValueError(f"output must be a folder to write to, got {output}: {error.strerror}") from error
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield stack.enter_context(removed_if_interrupted(folder))


def _silenced(batches: Iterable[Loaded]) -> Iterator[Loaded]:
    """The same, in which clips that have anything have sound and subtitles: loaders put silence where they have not."""
    for batch, where in batches:
        anything = np.any(list(where.values()), axis=0)
        yield batch, {name: mask | anything if name in SILENT else mask for name, mask in where.items()}


def _progress(batches: Iterator[Loaded], count: int, batch_size: int, what: str) -> tqdm:
    return tqdm(batches, total=-(-count // batch_size), desc=what, unit="batch", disable=None)


def _text_batches(tokens: dict[str, np.ndarray], batch_size: int) -> Iterator[Loaded]:
    count = len(tokens["ids"])
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size)
        # The last batch is filled up with repeated texts, so that there is one shape to compile.
        yield (
            {"caption": {name: values[rows % count] for name, values in tokens.items()}},
            {"caption": np.ones((rows < count).sum(), bool)},
        )


if __name__ == "__main__":
    with interrupts_end_at_once("interrupted"), one_line_errors():
        main(tyro.cli(EvaluateClips, description=__doc__))
