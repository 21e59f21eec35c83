"""Try LoGoPrompt in a browser: see blocks and selection, measure whether a backbone reads, classify, teach classes.

    make app                              # installs what it needs, and starts
    python tools/app.py --port 7860

The page is a view on ``trainers/predictor.py``, ``tools/preview.py``, ``tools/figure1.py`` and ``train.py``. It loads
nothing from the network. Uploads and runs are in one temporary folder, which is removed when the program ends.
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    title, examples = __doc__.split("\n\n")[:2]
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=title, epilog=f"examples:\n{examples}", formatter_class=style)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; others than 127.0.0.1 let other machines in")
    add("--port", type=int, default=7860, help="of the page; 0: any that is free (7860)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and mistakes in the flags end here: the imports below take seconds
    if find_spec("gradio") is None:
        print("error: gradio is not installed: use make app, or install requirements-app.txt", file=sys.stderr)
        sys.exit(2)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import app_teach as work  # isort: skip (makes `import dassl` work)
import torch
from torchvision.transforms.functional import to_pil_image

import preview
import train
from trainers.predictor import Predictor, Source, run_config
from trainers.prompting.data import read_image
from trainers.prompting.errors import UserError
from trainers.prompting.image_batch import ImageBatch
from trainers.prompting.names import clean_name
from trainers.prompting.paste import places_of
from trainers.prompting.render import blocks_of

os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="logoprompt-app-")
os.environ |= {"GRADIO_TEMP_DIR": f"{tempfile.tempdir}/uploads", "MPLCONFIGDIR": f"{tempfile.tempdir}/matplotlib"}
atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)

import gradio as gr  # noqa: E402 (writes there when it is imported)

import app_view as view  # noqa: E402

SHOWN, TABLE, MAX_IMAGES, BOXES = 6, 200, 500, 10  # images on the tab See, in a table, at once; boxes of classes
MAX_FILE = "20mb"
BY_HAND, NAMES = "by hand", ["tiny", "tiny-vit", "RN50", "ViT-B/16"]
BACKBONES: dict[Any, Any] = {}  # loaded ones; all sessions share them, none changes them
TRAININGS: dict[Optional[str], work.Training] = {}  # that are running, by browser session
LOCK = threading.Lock()  # one model at a time: the cores are shared, and stdout is redirected while models are built


# ------------------------------------------------------------------------------------------------- what the user gave
def images_of(images: Optional[Sequence[Source]]) -> Sequence[Source]:
    if not images:
        raise UserError("Drop in at least one image.")
    if len(images) > MAX_IMAGES:
        raise UserError(f"{len(images)} images are too many for this page: at most {MAX_IMAGES} at once.")
    return images


def classes_of(boxes: Sequence[Any]) -> tuple[dict[str, list[Source]], list[str]]:
    found, faults = work.read_classes(list(zip(boxes[::2], boxes[1::2])))
    images_of([source for group in found.values() for source in group])
    return found, faults


def predictor_of(model: Optional[str], names: Sequence[str], **options: Any) -> Predictor:
    """Of a run folder or, before any training, of a backbone; LoGoPrompt's ``options`` override those of a run."""
    model = (model or "").strip()
    if is_run := os.path.isdir(os.path.expanduser(model)):
        if run_config(os.path.expanduser(model)).TRAINER.LOGOPROMPT.TUNE_VISUAL:
            options.pop("BLOCK_HEIGHT", None)  # learned blocks keep their size
    elif not names:
        raise UserError("The list of classes is empty: type at least one name.")
    keys = {f"TRAINER.LOGOPROMPT.{key}": value for key, value in options.items()}
    if is_run:
        pairs = [word for pair in keys.items() for word in pair]
        return Predictor(model, names or None, options=pairs, backbones=BACKBONES)
    keys["TRAINER.LOGOPROMPT.TEXT_PROMPT"] = "generic"  # starts as the words of CTX_INIT: zero-shot CLIP
    cfg = train.setup_cfg(train.parse_args(work.arguments("LoGoPrompt", model, **keys)))
    return Predictor.untrained(cfg, names, BACKBONES)


def logoprompt_of(model: str, names: Sequence[str], **options: Any) -> Predictor:
    predictor = predictor_of(model, names, **options)
    if (trainer := predictor.cfg.TRAINER.NAME) != "LoGoPrompt":
        raise UserError(f"{model}: a run of {trainer}, which has no blocks; the tab Classify works with it.")
    return predictor


def guarded(outputs: int) -> Callable:
    """One call at a time. An error becomes a sentence in the first output and leaves the others as they are."""

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def call(*args: Any) -> Any:
            try:
                with LOCK, work.silently():
                    return function(*args)
            except Exception as error:  # noqa: BLE001 (the page goes on working)
                return view.failure(error) if outputs == 1 else (view.failure(error), *[gr.skip()] * (outputs - 1))

        return call

    return decorate


# ------------------------------------------------------------------------------------------------- what it gets
@guarded(1)
def see(
    images: Any, names: str, model: str, height: float, place: str, down: float, seed: float, k: float, font: str
) -> str:
    """Blocks V_c, and the candidates of each image."""
    images, location = images_of(images), "random" if place == BY_HAND else place
    options = {"BLOCK_HEIGHT": height / 14, "LOCATION": location, "VISUAL_SEED": int(seed or 0), "FONT": font or ""}
    predictor = logoprompt_of(model, work.names_of(names), K=int(k), **options)
    options, method = predictor.cfg.TRAINER.LOGOPROMPT, predictor.trainer.model
    size, names = predictor.trainer.backbone.input_resolution, predictor.classnames
    if place == BY_HAND:
        where = torch.tensor([[min(down, 0.999), 0.5]], dtype=torch.float64)
        method.places = lambda batch: places_of(where.expand(len(batch), 2), size, method.block, "random")
    blocks = blocks_of(options, names, size)
    blocks = preview.tuned(blocks, names, os.path.expanduser(model)) if options.TUNE_VISUAL else blocks
    shown = [view.picture(to_pil_image(block), f"block of {name}") for block, name in zip(blocks[:40], names)]
    parts = [f'<div class="lp-blocks">{"".join(shown)}</div>', *map(view.paragraph, predictor.warnings)]
    if len(images) > SHOWN:
        parts.append(view.paragraph(f"The first {SHOWN} of {len(images)} images; the tab Classify takes all of them."))
    for found in predictor.explain(images[:SHOWN]):
        error = found.prediction.error
        parts.append(view.paragraph(error, "alert") if error else view.selection(found))
    return "".join(parts)


@guarded(1)
def why(model: str, further: str, *boxes: Any) -> str:
    """Figure 1: what blocks do to the scores of these images."""
    import figure1  # takes a second; not before MPLCONFIGDIR is set

    classes, faults = classes_of(boxes)
    predictor = logoprompt_of(model, list(dict.fromkeys([*classes, *map(clean_name, work.names_of(further))])))
    trainer, batches = predictor.trainer, []
    items = [(source, predictor.classnames.index(name)) for name, group in classes.items() for source in group]
    for chunk in (items[i : i + 50] for i in range(0, len(items), 50)):
        pixels = torch.stack([predictor.transform(read_image(source.path)) for source, _ in chunk]).to(trainer.device)
        batch = ImageBatch(trainer.backbone, pixels, [source.relative for source, _ in chunk])
        batches.append((batch, torch.tensor([label for _, label in chunk], device=trainer.device)))
    trainer.source = SimpleNamespace(batches=lambda loader, use_store: batches)
    values = figure1.zero_shot(trainer)
    first, *more = view.verdict(values, figure1.reading_score(values), figure1.prospect(values))
    notes = map(view.paragraph, [*faults, *predictor.warnings, *more])
    return "".join([view.paragraph(first, "answer"), *notes, view.chart(values)])


@guarded(3)
def classify(images: Any, model: str, names: str) -> tuple[Any, ...]:
    """A table of predictions, and the files to download."""
    predictor, results, rows, same = predictor_of(model, work.names_of(names)), [], [], []
    for found in predictor.explain(images_of(images)):
        prediction, result = found.prediction, {"path": found.prediction.relative}
        if prediction.error:
            result["error"] = view.short(prediction.error)
        else:
            result |= {"classes": prediction.classes, "scores": prediction.scores}
            if found.candidates[0].conditional is not None:
                result["without_selection"] = found.candidates[0].classname
                same.append(found.selected == 0)
        results.append(result)
        rows += [view.prediction_row(found)] if len(rows) < TABLE else []
    files = view.save_predictions(tempfile.mkdtemp(), results)
    notes, summary = map(view.paragraph, predictor.warnings), view.summary(results, same, len(rows))
    buttons = (gr.DownloadButton(value=path, interactive=True) for path in files)
    return "".join([*notes, summary, view.table(rows, bool(same))]), *buttons


def teach(request: gr.Request, runs: list[str], method: str, model: str, epochs: float, *boxes: Any) -> Iterator[Any]:
    """Train on the images of all boxes: status, runs of this session, two fields that offer them, the run as a zip."""
    waiting, folder = [gr.skip()] * 4, Path(tempfile.mkdtemp())
    try:
        with LOCK, work.silently():
            classes, faults = classes_of(boxes)
            words = work.prepare(folder, classes, method, (model or "").strip(), int(epochs))
            text = "Trained. Drop further images in below to test it, or choose the run on the other tabs."
            if method == "TipAdapter":
                work.train_here(words)
        if method != "TipAdapter":
            yield view.progress("Starting …", 0, 0), *waiting
            stop(request)  # an earlier one of this session
            training = TRAININGS[request.session_hash] = work.Training(words)
            for done, total in training.epochs():
                yield view.progress(f"Epoch {done} of {total}", done, total), *waiting
            if not training.finished():
                text = "Stopped. The last complete epoch was saved: test it below, or choose it on the other tabs."
                if not any(folder.glob("run/prompt_learner/model*")):
                    raise UserError("Stopped before the first epoch was complete: nothing was learned.")
        runs = [*runs, str(folder / "run")]
        choices = [*NAMES, *((f"run {i} of this page", path) for i, path in enumerate(runs, 1))]
        packed = shutil.make_archive(str(folder / f"run-{len(runs)}"), "zip", folder / "run")
        status = "".join(map(view.paragraph, faults)) + view.paragraph(text, "answer")
        yield status, runs, *[gr.Dropdown(choices=choices)] * 2, gr.DownloadButton(value=packed, interactive=True)
    except Exception as error:  # noqa: BLE001 (the page goes on working)
        yield view.failure(error), *waiting


def test_run(images: Any, runs: list[str]) -> str:
    """Predictions of the last run of this session."""
    return classify(images, runs[-1], "")[0] if runs else view.paragraph("Train first, with the boxes above.", "alert")


def stop(request: gr.Request) -> None:
    """End the training of this session, if there is one."""
    if training := TRAININGS.pop(request.session_hash, None):
        training.stop()


# ------------------------------------------------------------------------------------------------- the page
def image_field(**options: Any) -> gr.File:
    field = gr.File(**{"label": "Images", "file_count": "multiple", "height": 190, **options})
    field.preprocess = work.sources  # the names that the files have on the user's disk
    return field


def model_field(label: str = "Backbone or run folder", info: str = "any name, or a path") -> gr.Dropdown:
    return gr.Dropdown(NAMES, value="tiny", allow_custom_value=True, label=label, info=info)


def class_boxes(drawings: dict[str, list[str]]) -> list[Any]:
    """Boxes of a class name and its images, two at first; a button shows more."""
    fields, columns, shown = [], [], gr.State(2)
    with gr.Row():
        for i in range(1, BOXES + 1):
            with gr.Column(min_width=240, visible=i <= 2, elem_classes="lp-box") as column:
                fields += [gr.Textbox(label=f"Class {i}", max_lines=1), image_field(label=f"Images of class {i}")]
            columns.append(column)
    with gr.Row():
        more, fill = gr.Button("Add a class", size="sm"), gr.Button("Use example drawings", size="sm")

    def show(n: int) -> list[Any]:
        return [min(n, BOXES), *(gr.Column(visible=i < n) for i in range(BOXES))]

    values = [value for pair in list(drawings.items())[:3] for value in pair]
    more.click(lambda n: show(n + 1), shown, [shown, *columns], show_progress="hidden")
    fill.click(lambda n: [*values, *show(max(n, 3))], shown, [*fields[: len(values)], shown, *columns])
    return fields


def build() -> gr.Blocks:
    """The page."""
    drawings, training = work.examples(1), work.examples(4)
    paths, names = [path for group in drawings.values() for path in group], "\n".join(drawings)
    lines = {"lines": 4, "max_lines": 8, "info": "one a line"}
    with gr.Blocks(title="LoGoPrompt", analytics_enabled=False, fill_width=True) as page:
        gr.HTML("<h1>LoGoPrompt</h1><p>Images of class names as visual prompts for CLIP</p>", elem_classes="lp-head")
        with gr.Tab("See"), gr.Row():
            with gr.Column(scale=1, min_width=280):
                fields = [image_field(value=paths[:3]), gr.Textbox(names, label="Classes", **lines), model_field()]
                height = gr.Slider(0.5, 14, 2, step=0.5, label="Height of the block, 14ths of the image")
                place = gr.Radio(["random", "top", "bottom", BY_HAND], value="random", label="Place of the block")
                down = gr.Slider(0, 1, 0.5, step=0.01, label="Distance from the top", visible=False)
                seed = gr.Number(0, precision=0, label="Seed of places and colours")
                k = gr.Slider(1, 10, 5, step=1, label="K, number of candidates")
                any_path = {"allow_custom_value": True, "info": "or the path of a file"}
                font, see_model = gr.Dropdown(view.fonts(), value="", label="Font", **any_path), fields[2]
                fields += [height, place, down, seed, k, font]
            with gr.Column(scale=3, min_width=280):
                seen = gr.HTML(elem_id="see")
        place.change(lambda place: gr.Slider(visible=place == BY_HAND), place, down, show_progress="hidden")
        events = [page.load, *(field.change for field in fields)]
        gr.on(events, see, fields, seen, trigger_mode="always_last", show_progress="minimal")
        with gr.Tab("Why"):
            gr.Markdown("Does this backbone read? Scores without a block, with that of the class, and with another.")
            boxes = class_boxes(training)
            with gr.Row():
                options = [model_field(), gr.Textbox(names, label="Further classes", **lines)]
            gr.Button("Measure", variant="primary").click(why, [*options, *boxes], gr.HTML(elem_id="why"))
        with gr.Tab("Classify"):
            with gr.Row():
                images, options = image_field(), [model_field(), gr.Textbox(label="Classes, empty: the run's", **lines)]
            with gr.Row():
                folder = gr.UploadButton("Choose a folder", file_count="directory")
                fill, start = gr.Button("Use example drawings"), gr.Button("Classify", variant="primary")
            folder.upload(lambda found: found, folder, images)
            fill.click(lambda: (paths, names), None, [images, options[1]])
            answer = gr.HTML(elem_id="classify")
            with gr.Row():
                files = [gr.DownloadButton(f"Download {kind}", interactive=False) for kind in ("CSV", "JSON")]
            start.click(classify, [images, *options], [answer, *files])
        with gr.Tab("Teach"):
            runs, boxes = gr.State([]), class_boxes(training)
            with gr.Row():
                methods = [("Tip-Adapter, at once", "TipAdapter"), "LoGoPrompt"]
                method = gr.Radio(methods, value="TipAdapter", label="Method")
                backbone = model_field("Backbone", "any name, or a file of weights")
                epochs = gr.Slider(2, 200, 10, step=1, label="Epochs of LoGoPrompt")
            with gr.Row():
                start, end = gr.Button("Train", variant="primary"), gr.Button("Stop", variant="stop")
                packed = gr.DownloadButton("Download the run", interactive=False)
            outputs = [gr.HTML(elem_id="teach"), runs, see_model, options[0], packed]
            inputs = [runs, method, backbone, epochs, *boxes]
            start.click(teach, inputs, outputs, show_progress="hidden", concurrency_limit=4)
            end.click(stop, concurrency_limit=None)
            further = image_field(label="Further images, to test it")
            further.change(test_run, [further, runs], gr.HTML(elem_id="test"))
        page.unload(stop)
    return page


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status."""
    args = parse_args(argv)
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        print("WARNING: whoever reaches this address can use the page and name files of this machine", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = {"server_name": args.host, "server_port": args.port or None, "share": False, "max_file_size": MAX_FILE}
    style = {"theme": view.theme(), "css_paths": Path(__file__).with_suffix(".css"), "footer_links": ["settings"]}
    _, url, _ = build().launch(**options, **style, quiet=True, prevent_thread_lock=True)
    print(f"LoGoPrompt is on {url} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
