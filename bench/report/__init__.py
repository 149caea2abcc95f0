"""`python -m bench report`: README's tables and the plots, from the results files."""
