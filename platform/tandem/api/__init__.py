"""Wire models of the JSON routes, and checks of the fields of model requests. vLLM parses the bodies of these itself."""
