"""Results of a measurement as one page of HTML."""

from __future__ import annotations

from ..report.bars import as_html, bar_row, document
from .rounds import Measurement
from .tables import COLUMNS, rows, ways

_KINDS = {"ours": "path", "plain": "quiet", "peer": ""}


def page_of_results(measurement: Measurement, workload: str, machine: str) -> str:
    """The page: a bar for each way of reading, as long as its median of GB/s.

    Args:
        measurement: the results.
        workload, machine: each described in a line.
    """
    title = measurement.scenario.title
    parts = [f'<p class="soft">{as_html(workload)}; medians of {measurement.rounds} rounds</p><div>']
    fastest = max((result.median for result in measurement.results if result.seconds), default=1.0)
    for result, (name, *figures) in zip(measurement.results, rows(measurement), strict=True):
        pieces = [(0.0, result.median)] if result.seconds else []
        figure = f"{figures[0]} GB/s" if result.seconds else figures[0]
        hint = "; ".join(f"{column}: {value}" for column, value in zip(COLUMNS[1:], figures, strict=True))
        parts.append(bar_row(name, figure, pieces, fastest, _KINDS[result.contender.kind], hint=f"; {hint}"))
    parts.append("</div>")
    parts += [f'<p class="soft">{as_html(line)}</p>' for line in (*ways(measurement), machine)]
    parts += [f"<p>Note: {as_html(warning)}</p>" for warning in measurement.warnings]
    return document(f"{title[0].upper()}{title[1:]}", parts)
