"""What a method may know: the call of a layer, the roles of its rows, regions, steps and the layers of a model."""
