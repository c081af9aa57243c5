"""Takes files from strangers and keeps them: in a stream, durably, and never under their names.

    multipart   the one file of a form, while its body still arrives
    transfer_encoding
                base64 and quoted-printable, decoded while they arrive
    names       what a file is called and what it is, as far as a stranger can be believed
    store       the protocol of every store, its errors, and `open_store`, which picks one by URL
    incoming    a stream on its way into a store: counted, hashed, and whole or not at all
    local       a store in a directory of this machine
    s3          a store in a bucket
    pictures    thumbnails, made in a process of their own
    colours     the colours of a picture, brought to sRGB

The way of an upload: `multipart.file_part` hands its bytes to `Store.receive`, which returns once
they are durable; `names.media_type` and `Pictures.thumbnail` look at them; `Store.publish` makes
them available.
"""
