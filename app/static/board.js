// The script of every page: see below. The pages work without it.
"use strict";
