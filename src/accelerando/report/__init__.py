"""Reports: on the terminal and as a page.  They never measure."""
