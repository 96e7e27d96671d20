"""The page's charts as Vega-Lite specifications. Pure functions of names: the data of a run joins them in the browser."""
