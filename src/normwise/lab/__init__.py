"""The lab: the papers' comparisons on real data, side by side."""
