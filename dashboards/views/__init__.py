"""Pages of the dashboard: one file each. Not named "pages": Streamlit runs the files of such a folder by itself."""
