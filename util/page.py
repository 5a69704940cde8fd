"""Pages to be read in a browser, without network, from one template."""

from __future__ import annotations

from pathlib import Path

from util.outputs import write_text

TEMPLATE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font-family: sans-serif; line-height: 1.4; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; color: #222; overflow-wrap: anywhere }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
th, td { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right;
         overflow-wrap: normal }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; border: 1px solid #ddd }
figure { margin: 1.5em 0 }
pre { overflow-x: auto; background: #f5f5f5; padding: 1em; font-size: 85% }
details pre { white-space: pre-wrap }
</style>
<body>
<h1>{{ title }}</h1>
{% for part in parts %}
{% if part.heading %}<h2>{{ part.heading }}</h2>{% endif %}
{% if part.text %}<p>{{ part.text }}</p>{% endif %}
{% if part.head or part.rows %}
<table>
{% if part.head %}<tr>{% for cell in part.head %}<th>{{ cell }}</th>{% endfor %}</tr>{% endif %}
{% for row in part.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}
{% if part.verbatim %}<pre>{{ part.verbatim }}</pre>{% endif %}
{% for address, caption in part.figures %}
<figure><a href="{{ address }}"><img src="{{ address }}" alt="{{ caption }}" loading="lazy"></a>
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% if part.links %}
<ul>
{% for address, text in part.links %}
<li><a href="{{ address }}">{{ text }}</a></li>
{% endfor %}
</ul>
{% endif %}
{% for summary, text in part.details %}
<details><summary>{{ summary }}</summary><pre>{{ text }}</pre></details>
{% endfor %}
{% endfor %}
</body>
</html>
"""


def write_page(path: Path, title: str, parts: list[dict]) -> None:
    """Write a page of parts. A part has any of heading, text, rows (of cells) with a head, verbatim
    text, figures (address, caption), links (address, text) and details (summary, text), and is
    shown in this order. All text is escaped.
    """
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE)
    write_text(path, template.render(title=title, parts=parts))
