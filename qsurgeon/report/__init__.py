"""Reports: what a model computes with, as rows, tables and JSON. Its parts are imported by name: tables are cheap."""
