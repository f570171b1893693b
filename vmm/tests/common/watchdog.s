# A guest with a watchdog (Intel 6300ESB, slot 31 of the bus): ring 3, 64 bits, one vCPU, no interrupts, no stack.
#
# It sets the watchdog up and arms it as Linux's driver does, both stages with the preload that stands at 0x1f0008. Then it feeds it while the word at
# 0x1f0000 is 1, and counts that at 0x200000; and it hangs while it is 0.
#
# r8 registers of the watchdog   r12 0x200000   r13 0x1f0000

    mov     r8d, 0xc0000000
    mov     r12d, 0x200000
    mov     r13d, 0x1f0000
    # Its address; memory decoding.
    mov     edx, 0xcf8
    mov     eax, 0x8000f810
    out     dx, eax
    mov     edx, 0xcfc
    mov     eax, 0xc0000000
    out     dx, eax
    mov     edx, 0xcf8
    mov     eax, 0x8000f804
    out     dx, eax
    mov     edx, 0xcfc
    mov     eax, 2
    out     dx, eax
    # The slow pace, no interrupt.
    mov     edx, 0xcf8
    mov     eax, 0x8000f860
    out     dx, eax
    mov     edx, 0xcfc
    mov     eax, 3
    out     dx, eax
    # Preloads.
    mov     byte ptr [r8 + 12], 0x80
    mov     byte ptr [r8 + 12], 0x86
    mov     eax, [r13 + 8]
    mov     [r8], eax
    mov     byte ptr [r8 + 12], 0x80
    mov     byte ptr [r8 + 12], 0x86
    mov     eax, [r13 + 8]
    mov     [r8 + 4], eax
    # Armed.
    mov     edx, 0xcf8
    mov     eax, 0x8000f868
    out     dx, eax
    mov     edx, 0xcfc
    mov     eax, 2
    out     dx, eax

30: mov     ecx, 10000
31: pause
    dec     ecx
    jnz     31b
    cmp     qword ptr [r13], 1
    jne     30b
    mov     byte ptr [r8 + 12], 0x80
    mov     byte ptr [r8 + 12], 0x86
    mov     word ptr [r8 + 12], 0x100
    inc     qword ptr [r12]
    jmp     30b
