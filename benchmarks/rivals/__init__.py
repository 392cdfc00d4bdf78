"""Other people's ways to do the same work, for the rows beside ours."""
