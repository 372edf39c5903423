"""results.json → report.html: one offline file with every figure, its numbers and where they come from."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pingscope.figures import (
    attribution,
    behaviour,
    bounds,
    collapse,
    detectors,
    finetuning,
    first_token,
    injection,
    pareto,
    patching,
    probing,
    restoration,
    robustness,
    search,
    steering,
    summary,
    theme,
    tokens,
    tracks,
)
from pingscope.figures.section import Section
from pingscope.interp.errors import UserError
from pingscope.interp.files import atomic_write, read_json
from pingscope.schema import Results, check_tokens, load_results

DRAW: dict[str, Callable[[Results], Section | None]] = {
    "behaviour": behaviour.section,
    "first_token": first_token.section,
    "curves or tracks": tracks.section,
    "collapse": collapse.section,
    "attribution": attribution.section,
    "patching": patching.section,
    "restoration or readout": restoration.section,
    "probes": probing.section,
    "detectors": detectors.section,
    "steering": steering.section,
    "injection": injection.section,
    "behaviour (trade-off)": pareto.section,
    "search": search.section,
    "bounds": bounds.section,
    "guards or attacks or transfer": robustness.section,
    "dose_response": finetuning.section,
}
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def build_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` beside ``results.json`` and return its path.

    The same results give the same bytes. Sections whose numbers are absent are left out.

    Raises:
        UserError: a file is missing or malformed; the message names the file and the field.
    """
    run_dir = Path(run_dir)
    path = run_dir / "results.json"
    results = load_results(path)
    token_path = run_dir / "tokens.json"
    rows = check_tokens(read_json(token_path), token_path) if token_path.exists() else results.tokens or []

    sections = []
    for name, draw in DRAW.items():
        try:
            section = draw(results)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: field '{name}' has an unexpected shape ({what}); run its stage again") from error
        if section is not None:
            sections.append(section)

    target = run_dir / "report.html"
    atomic_write(target, _render(results, sections, tokens.payload(rows)))
    return target


def _render(results: Results, sections: list[Section], token_data: dict[str, Any] | None) -> str:
    figures = {
        f"{section.id}-{index}": json.loads(panel.figure.to_json(engine="json"))
        for section in sections
        for index, panel in enumerate(section.panels)
    }
    plotly = get_plotlyjs()
    script = _source("report.js")
    return TEMPLATES.get_template("report.html").render(
        title=results.meta.title or "Pingscope report",
        note=results.meta.note,
        claims=summary.claims(results),
        verdict=summary.headline(results),
        tiles=summary.tiles(results),
        sections=sections,
        tokens=token_data,
        roles=list(tracks.ROLES),
        methods=summary.methods(results),
        limits=summary.limits(results),
        provenance=summary.provenance(results),
        light=Markup(theme.css_variables(dark=False)),
        dark=Markup(theme.css_variables(dark=True)),
        style=Markup(_source("style.css")),
        plotly=Markup(plotly),
        script=Markup(script),
        policy=_policy(plotly, script),
        data=Markup(
            _inert({"figures": figures, "tokens": token_data, "dark": theme.dark_partners(), "config": theme.CONFIG})
        ),
    )


def _source(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _policy(*scripts: str) -> str:
    """A content policy under which only the report's own scripts run and nothing is fetched."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"


def _inert(value: Any) -> str:
    """JSON that cannot end its script element or start another, whatever the prompts hold."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
