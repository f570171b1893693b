# What every hand-made guest's driver does first, as macros: of a virtio device in a slot of the bus, without firmware and interrupts. They are to be
# assembled before a guest's program; they use eax and edx, and r8 for the device's registers, which the program loads with `bar`.

# BAR 0 at `bar` (where none is, should there be a firmware that has given others out), then memory and bus master.
.macro virtio_plug slot, bar
    mov     edx, 0xcf8
    mov     eax, 0x80000010 + \slot * 0x800
    out     dx, eax
    mov     edx, 0xcfc
    mov     eax, \bar
    out     dx, eax
    mov     edx, 0xcf8
    mov     eax, 0x80000004 + \slot * 0x800
    out     dx, eax
    mov     edx, 0xcfc
    mov     eax, 6
    out     dx, eax
.endm

# Reset, acknowledge, driver; these of the first 32 features and version 1; features agreed (virtio 1.2, 3.1.1).
.macro virtio_begin features
    mov     byte ptr [r8 + 0x14], 0
    mov     byte ptr [r8 + 0x14], 1
    mov     byte ptr [r8 + 0x14], 3
    mov     dword ptr [r8 + 0x08], 0
    mov     dword ptr [r8 + 0x0c], \features
    mov     dword ptr [r8 + 0x08], 1
    mov     dword ptr [r8 + 0x0c], 1
    mov     byte ptr [r8 + 0x14], 0x0b
.endm

# A queue of 8 entries with its descriptors, driver area and device area.
.macro virtio_queue number, descriptors, driver, device
    mov     word ptr [r8 + 0x16], \number
    mov     word ptr [r8 + 0x18], 8
    mov     dword ptr [r8 + 0x20], \descriptors
    mov     dword ptr [r8 + 0x24], 0
    mov     dword ptr [r8 + 0x28], \driver
    mov     dword ptr [r8 + 0x2c], 0
    mov     dword ptr [r8 + 0x30], \device
    mov     dword ptr [r8 + 0x34], 0
    mov     word ptr [r8 + 0x1c], 1
.endm

# Ready (3.1.1, step 8).
.macro virtio_ready
    mov     byte ptr [r8 + 0x14], 0x0f
.endm
