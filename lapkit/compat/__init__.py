"""Other libraries' names for what lapkit does, so that scripts written for them run on lapkit."""
