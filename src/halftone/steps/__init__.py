"""The steps from a pipeline to what an artefact is packed from, one file each."""
