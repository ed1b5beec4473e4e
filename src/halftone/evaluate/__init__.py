"""From images to figures: features, distances, alignment, paired comparison, and how sure each figure is."""
