"""One module per figure: a table computed from real data, and a pure drawing of it."""

from ellq.paper_figures.registry import FIGURES as FIGURES
from ellq.paper_figures.registry import PaperFigure as PaperFigure
from ellq.paper_figures.registry import figure_named as figure_named
from ellq.paper_figures.registry import make as make
from ellq.paper_figures.registry import render as render
