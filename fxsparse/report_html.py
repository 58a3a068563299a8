"""A report as one HTML page without outside files."""

from base64 import b64encode
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxsparse.report import Report

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>fxsparse report</title>
<style>
.fxsparse { font: 14px/1.5 system-ui, sans-serif; max-width: 100%; margin: 1.5em; }
.fxsparse .scroll { overflow-x: auto; }
.fxsparse table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.fxsparse th, .fxsparse td { border-bottom: 1px solid #8884; padding: .2em .7em; text-align: left; white-space: nowrap; }
.fxsparse img { max-width: 100%; }
</style>
</head>
<body class="fxsparse">
<h1>fxsparse report</h1>
{% for title, headers, rows in tables %}
<h2>{{ title }}</h2>
<div class="scroll"><table>
<thead><tr>{% for header in headers %}<th>{{ header }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% endfor %}
{% for title, png in plots %}
<h2>{{ title }}</h2>
<img alt="{{ title }}" src="data:image/png;base64,{{ png }}">
{% endfor %}
</body>
</html>
"""


def page(report: "Report", plots: Mapping[str, bytes]) -> str:
    """The report's tables, then `plots` ({title: PNG bytes}) embedded; all text is escaped."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE)
    images = [(title, b64encode(png).decode()) for title, png in plots.items()]
    return template.render(tables=report.tables(), plots=images)
