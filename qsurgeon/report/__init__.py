"""Reports: what a model computes with, as rows, tables and JSON. Import its parts by name: tables are cheap."""
