"""Receives files from clients and stores them durably, under ids of our own.

    multipart   reads the one file of a form while the body arrives
    transfer_encoding
                decodes base64 and quoted-printable while the file arrives
    names       checks the name and the media type of a file, because the client may send any
    store       the protocol of every store, and its errors
    open_store  opens the store that a URL names
    incoming    writes a stream into a store, counts and hashes it, and keeps all of it or nothing
    local       a store in a directory of this machine
    s3          a store in a bucket
    pictures    makes thumbnails in a child process
    colours     converts the colours of a picture to sRGB

An upload passes them in this order. `multipart.file_part` yields the bytes of the file.
`Store.receive` returns once they are durable. A task then checks the file with `names.media_type`,
makes it available with `Store.publish`, and calls `Pictures.thumbnail`.
"""
