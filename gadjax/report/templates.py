"""What both pages of the report are made with: templates that escape every text, and their style."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).parent
TEMPLATES = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
STYLE = (HERE / "style.css").read_text(encoding="utf-8")
