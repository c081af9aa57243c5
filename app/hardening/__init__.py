"""Protection against hostile clients. `app.main` attaches it; the service works without it.

gate      who may come in: API keys, and how often one client may ask
api_keys  reads the keys, and finds the client of one
openapi   puts the API keys into the OpenAPI document
origins   answers browsers that show pages of another site (CORS)
"""
