"""What a method may know: the call of a layer, the roles of the batch's rows, regions, steps, layer names."""
