"""What is done before run time: a model fetched, converted, proven."""
