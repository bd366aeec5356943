"""Every figure, once, for pages and notebooks: `live` in Altair, the others in Plotly."""
