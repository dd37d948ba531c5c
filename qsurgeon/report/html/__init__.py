"""Reports as HTML files and as pictures: charts that Vega-Lite draws, and a table."""
