"""Search and confirmation on Ray Tune, Ray Train and Optuna: the only room that knows them."""
