"""Data references and what they load: built-in sets, npz files, image folders, functions of the user's."""
