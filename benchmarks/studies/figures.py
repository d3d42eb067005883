"""Charts of the report as files of their own, for pages that are read where the report's style sheet is not."""

from __future__ import annotations

from pathlib import Path

from arte_edge.cache import write_atomic
from arte_edge.publish.report.charts import Plot

__all__ = ["write_svg"]

# Okabe and Ito's palette, darkened where it would be faint on white (arte_edge/publish/report/templates/report.css)
_COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#a8528a", "#2f8fc4", "#946200", "#6a6a00", "#444444")


def write_svg(plot: Plot, path: Path) -> None:
    """Write one chart with a white ground, its own colours and fonts."""
    rules = "".join(f".s{i}{{color:{colour};fill:{colour};stroke:{colour}}}" for i, colour in enumerate(_COLOURS))
    style = rules + (
        "text{font:12px system-ui,sans-serif;fill:#1c1c1c;stroke:none}.grid{stroke:#e3e3e3}"
        ".axis,.rule path{stroke:#555;fill:none}.line,.line path,.line polyline{fill:none;stroke-width:2}"
        ".dashed{stroke-dasharray:5 4}.hollow{fill:none;stroke-width:1.3}.area{stroke:none}"
    )
    svg = plot.svg()
    head, _, rest = svg.partition(">")
    size = head.split('viewBox="')[1].split('"')[0].split()
    head += f' xmlns="http://www.w3.org/2000/svg" width="{size[2]}" height="{size[3]}"'
    ground = f'<rect width="{size[2]}" height="{size[3]}" fill="#fff"/>'
    write_atomic(path, f"{head}><style>{style}</style>{ground}{rest}\n".encode())
