"""Explanations as PNG files and one HTML page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.files import write_bytes, write_text
from jaxtrain.explain.explainer import Explainer, Explanation, is_signed
from jaxtrain.explain.names import class_name, token_texts
from jaxtrain.monitor import pictures
from jaxtrain.monitor.pictures import Scale

PAGE = "index.html"
GENERATOR = '<meta name="generator" content="jaxtrain explain">'

ABOUT = {
    "integrated_gradients": "<b>Integrated gradients</b>: the part of each input in the difference between "
    "the logit of this class and that of the baseline; red speaks for the class, blue against it, and all "
    "add up to the difference.",
    "smoothgrad": "<b>SmoothGrad</b>: how strongly the logit reacts to a change of each input (mean gradient "
    "over noisy copies, absolute values added over channels).",
    "grad_cam": "<b>Grad-CAM</b>: where the feature maps of layer {layer} speak for the class ({size}, "
    "interpolated to the image).",
    "rollout": "<b>Attention rollout</b>: how much the prediction attends to each {unit}, through all "
    "layers; it is the same for every class.",
}
TITLES = {
    "integrated_gradients": "integrated gradients",
    "smoothgrad": "SmoothGrad",
    "grad_cam": "Grad-CAM",
    "rollout": "attention rollout",
}

HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
{generator}
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em; color: #111; background: #fff; }}
h1 {{ font-size: 1.3em; }} ul {{ max-width: 60em; padding-left: 1.2em; }}
table {{ border-collapse: collapse; }}
th, td {{ border-top: 1px solid #ddd; padding: 0.7em 1.2em 0.7em 0; text-align: left; vertical-align: top; }}
td:nth-child(2) {{ white-space: nowrap; }}
img {{ display: block; max-width: 22em; image-rendering: pixelated; }}
.small {{ color: #555; font-size: 0.87em; }}
.text {{ max-width: 46em; white-space: pre-wrap; overflow-wrap: anywhere; }}
.text {{ font: 15px/1.9 ui-monospace, monospace; }}
.text span {{ padding: 0.15em 0; }}
h2 {{ font-size: 0.9em; margin: 0.6em 0 0.2em; }}
.bar {{ display: inline-block; width: 8em; height: 0.8em; margin: 0 0.5em; }}
</style></head><body>
<h1>{title}</h1>
<ul>
{about}
</ul>
<table>
<tr>{header}</tr>
{rows}
</table></body></html>
"""


def write(
    folder: Path, title: str, explainer: Explainer, explanations: Sequence[Explanation], labels: Sequence[Any]
) -> tuple[Path, list[dict[str, Any]]]:
    """Write ``index.html`` and the pictures that it shows.

    Args:
      folder: where; made if it is missing.
      title: of the page.
      explainer: that made the explanations.
      explanations: a row of the page for each.
      labels: the true class of each, or None.

    Returns:
      The page, and for each explanation what ``--json`` prints.

    Raises:
      InputError: the folder has an ``index.html`` that is not of this function.
      RunError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_old(folder)
        rows, records = [], []
        for number, (one, label) in enumerate(zip(explanations, labels, strict=True)):
            files = {}
            if explainer.forward.kind != "tokens":
                for name, data in _pictures(explainer, one).items():
                    files[name] = f"{number:03d}-{name}.png"
                    write_bytes(folder / files[name], data)
            rows.append(_row(explainer, one, label, files))
            records.append(_record(explainer, one, label, files))
        text = HTML.format(
            generator=GENERATOR,
            title=html.escape(title),
            about="\n".join(
                f"<li>{_about(explainer, explanations, method)}</li>" for method in explainer.methods
            ),
            header="".join(f"<th>{name}</th>" for name in _columns(explainer)),
            rows="\n".join(rows),
        )
        # Names of files may hold bytes that are not UTF-8.
        write_text(folder / PAGE, text.encode(errors="backslashreplace").decode())
        return folder / PAGE, records
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error.strerror or error}): choose another folder with --out"
        ) from error


def _remove_old(folder: Path) -> None:
    """Remove the page of an earlier call, and then the pictures that it shows."""
    page = folder / PAGE
    if not page.exists():
        return
    if GENERATOR not in page.read_text(errors="replace"):
        raise InputError(f"{page} is not a page of explain: choose another folder with --out")
    page.unlink()
    for old in folder.glob("[0-9][0-9][0-9]-*.png"):
        old.unlink()


def _columns(explainer: Explainer) -> list[str]:
    if explainer.forward.kind == "tokens":
        return ["example", "prediction", "tokens"]
    return ["input", "prediction", *(TITLES[method] for method in explainer.methods)]


def _pictures(explainer: Explainer, one: Explanation) -> dict[str, bytes]:
    """Return the PNGs of an image or array: the input, and a map for each method."""
    forward = explainer.forward
    raw = np.asarray(one.example.inputs[forward.field])
    spec = forward.manifest.inputs[forward.field]
    if forward.kind == "image":
        numbers = raw.astype(np.float64)
        black = min(0.0, float(numbers.min()))
        white = spec.white or max(float(numbers.max()), 1e-12)
        shown = pictures.enlarge(pictures.grey_or_rgb(numbers, black, white))
        files = {"input": pictures.png(shown)}
    else:
        flat = raw.astype(np.float64)
        flat = flat.sum(-1) if flat.ndim == 3 else np.atleast_2d(flat)
        files = {"input": pictures.heat_map(flat, "diverging" if flat.min() < 0 else "sequential")}
    for method, values in one.maps.items():
        coarse = forward.kind == "image" and method in ("grad_cam", "rollout")
        shape = (raw.shape[0], raw.shape[1]) if coarse else None
        files[method] = pictures.heat_map(values, _scale(method), shape)
    return files


def _row(explainer: Explainer, one: Explanation, label: Any, files: dict[str, str]) -> str:
    name = html.escape(str(one.example.id))
    cells = [_prediction(explainer, one, label)]
    if files:
        images = {kind: f'<img src="{file}" alt="{kind}">' for kind, file in files.items()}
        cells.insert(0, f'{images["input"]}<div class="small">{name}</div>')
        cells += [images[method] for method in explainer.methods]
    else:
        cells.insert(0, f'<span class="small">{name}</span>')
        cells.append("".join(_text(explainer, one, method) for method in explainer.methods))
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _prediction(explainer: Explainer, one: Explanation, label: Any) -> str:
    forward, lines = explainer.forward, []

    def name(number: Any) -> str:
        return html.escape(class_name(forward, number))

    if one.prediction is not None and one.probability is not None:
        lines.append(f"<b>{name(one.prediction)}</b> ({100 * one.probability:.1f} %)")
    if label is not None:
        lines.append(f"true: {name(label)}")
    if one.target != one.prediction:
        lines.append(f"explained: {name(one.target)}")
    kind = "logit" if forward.has_classes else "output"
    lines.append(f'<span class="small">{kind} {one.value:.3f}; baseline {one.baseline:.3f}</span>')
    if one.error is not None:
        lines.append(f'<span class="small">completeness error {100 * one.error:.2g} %</span>')
    return "<br>".join(lines)


def _text(explainer: Explainer, one: Explanation, method: str) -> str:
    """Return a text coloured by attribution, and what the colours mean."""
    scale, (values, pieces) = _scale(method), token_texts(explainer.forward, one.example, one.maps[method])
    high, clipped = pictures.limit(values)
    spans = [
        f'<span style="{_style(tuple(rgb))}" title="{value:+.3g}">{html.escape(text)}</span>'
        for rgb, value, text in zip(_light(values, scale, high), values, pieces, strict=True)
    ]
    ends = np.linspace(-high if scale == "diverging" else 0.0, high, 5)
    colours = ", ".join(f"rgb{tuple(map(int, rgb))}" for rgb in _light(ends, scale, high))
    bar = f'<span class="bar" style="background: linear-gradient(to right, {colours})"></span>'
    sign = "≥ " if clipped else ""
    legend = f"{ends[0]:.2g}{bar}{sign}{high:.2g}"
    return (
        f'<h2>{TITLES[method]} <span class="small">{legend}</span></h2>'
        f'<div class="text">{"".join(spans)}</div>'
    )


def _light(values: np.ndarray, scale: Scale, high: float) -> np.ndarray:
    """Return background colours of text: white is 0 for both scales."""
    if scale == "diverging":
        return pictures.colour(values, scale, high)
    return pictures.colour(np.abs(values), "diverging", high)


def _style(rgb: tuple[Any, ...]) -> str:
    red, green, blue = map(int, rgb)
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 128
    return f"background: rgb({red}, {green}, {blue})" + ("; color: white" if dark else "")


def _about(explainer: Explainer, explanations: Sequence[Explanation], method: str) -> str:
    maps = [one.maps[method] for one in explanations[:1]]
    size = " × ".join(map(str, maps[0].shape)) if maps else ""
    unit = "token" if explainer.forward.kind == "tokens" else f"of {size} patches"
    text = ABOUT[method].format(layer=html.escape(explainer.layer or ""), size=size, unit=unit)
    if method == "smoothgrad" and explainer.forward.kind == "tokens":
        text = text.replace("absolute values added over channels", "norm over the embedding")
    return text


def _scale(method: str) -> Scale:
    return "diverging" if is_signed(method) else "sequential"


def _record(explainer: Explainer, one: Explanation, label: Any, files: dict[str, str]) -> dict[str, Any]:
    forward = explainer.forward
    record: dict[str, Any] = {"id": one.example.id}
    if one.prediction is not None:
        record |= {"prediction": class_name(forward, one.prediction), "probability": one.probability}
    if label is not None:
        record["label"] = class_name(forward, label)
    record |= {"target": class_name(forward, one.target), "value": one.value, "baseline": one.baseline}
    if one.error is not None:
        record["completeness_error"] = one.error
    if files:
        return {**record, "files": files}
    texts = {}
    for method, values in one.maps.items():
        numbers, pieces = token_texts(forward, one.example, values)
        texts[method] = [[text, float(number)] for text, number in zip(pieces, numbers, strict=True)]
    return {**record, "tokens": texts}
