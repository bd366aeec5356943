"""Everything that imports streamlit: the parts of the pages."""
