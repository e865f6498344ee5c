"""Colours that pages share."""

from __future__ import annotations

__all__ = ["COLORS"]

# 22 colours of cividis (Nuñez, Anderton & Renslow 2018), from low to high. It looks the same to colour-blind
# readers, and its lightness grows evenly.
COLORS = (
    "#00224e", "#002b62", "#053371", "#213b6e", "#32436d", "#3f4c6c", "#4c556c", "#575d6d",
    "#62656f", "#6c6e72", "#777776", "#828079", "#8e8978", "#999277", "#a59c74", "#b1a570",
    "#bfb06b", "#ccba64", "#d9c55c", "#e6d051", "#f3db42", "#fee838",
)  # fmt: skip
