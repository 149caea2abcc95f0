"""`python -m bench report`: tables of the documentation and plots, from results files."""
