"""The jinja2 template of a report's body."""

from __future__ import annotations

BODY = """\
{% if summary %}
<p>{{ summary }}</p>
{% endif %}
{% for run, epoch in unfinished %}
<p class="note">The run {{ run }} has not finished: the plots show it up to epoch {{ epoch }}.</p>
{% endfor %}
{% if rows %}
<div class="wide"><table>
<caption>Time includes fills and measurements, but not evaluation. In brackets: compared with the baseline.</caption>
<thead><tr>{% for column in columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:-1] %}<td>{{ cell }}</td>{% endfor %}
<td class="words">{{ row[-1] }}</td></tr>
{% endfor %}
</tbody>
</table></div>
{% else %}
<p class="note">No run has finished.</p>
{% endif %}
{% for title, caption, svg in figures %}
<h2>{{ title }}</h2>
{% if svg %}
<figure>{{ svg | safe }}<figcaption>{{ caption }}</figcaption></figure>
{% else %}
<p>Nothing was measured for this plot.</p>
{% endif %}
{% endfor %}
<h2>Drops</h2>
{% set words = ' class="words"' | safe %}
{% if drops %}
<div class="wide"><table>
<thead><tr><th scope="col">run</th><th scope="col">after epoch</th><th scope="col">layers dropped in all</th>
<th scope="col">which</th><th scope="col">reason</th><th scope="col">fill</th><th scope="col">size of a row</th>
<th scope="col">tier</th></tr></thead>
<tbody>
{% for drop in drops %}
<tr>{% for cell in drop %}<td{{ words if loop.index == 5 }}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% else %}
<p>No layer was dropped.</p>
{% endif %}
{% if changes %}
<h2>Last measurement</h2>
<div class="wide"><table>
<caption>Change of each layer's parameters over epoch {{ changes.epoch }} of the run {{ changes.run }}: norms of the change
and of the weights, the relative change, its cosine with the previous change, and the number of values that were not
finite.</caption>
<thead><tr><th scope="col">layer</th><th scope="col">l1</th><th scope="col">l2</th><th scope="col">largest</th>
<th scope="col">l1 of weights</th><th scope="col">l2 of weights</th><th scope="col">relative</th>
<th scope="col">cosine</th><th scope="col">not finite</th></tr></thead>
<tbody>
{% for row in changes.rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endif %}
{% if forecasts %}
<h2>Forecast and measured time</h2>
<div class="wide"><table>
<caption>Seconds of each epoch, including the computation of rows.</caption>
<thead><tr><th scope="col">run</th><th scope="col">epoch</th><th scope="col">forecast</th><th scope="col">measured</th>
<th scope="col">forecast off by</th></tr></thead>
<tbody>
{% for row in forecasts %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endif %}
{% if memory %}
<p>Peak memory: {% for run, size in memory %}{{ run }} {{ size }}{{ ", " if not loop.last }}{% endfor %}.</p>
{% endif %}
{% if config %}
<h2>Settings</h2>
<div class="wide"><table>
<tbody>
{% for name, value in config.items() %}
<tr><th scope="row">{{ name }}</th><td class="words">{{ value }}</td></tr>
{% endfor %}
</tbody>
</table></div>
{% endif %}
"""
