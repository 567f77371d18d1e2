"""pytest puts this folder on the path, so that the tests in store/ import the helpers beside this file."""
