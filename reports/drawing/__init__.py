"""Figures: planes, curves, maps and intervals, as PNG and as SVG."""
