#include <cuflash.h>
#include <math.h>
#include <stdio.h>

int main(void) {
    /* Two keys, one of which all queries prefer by ln 3: weights 3/4 and 1/4. */
    const float q[2] = {1, 1}, k[2] = {1.09861229f, 0}, v[2] = {8, 4};
    float o[2], l[2];
    int status = cuflash_attention_forward_f32(q, k, v, o, l, 1, 1, 2, 1, 1, false, NULL);
    printf("cuflash %s: %s, o = %g %g\n", cuflash_version(), cuflash_status_name(status), (double)o[0], (double)o[1]);
    bool right = fabsf(o[0] - 7) < 1e-5f && fabsf(o[1] - 7) < 1e-5f && fabsf(l[0] - 1.38629436f) < 1e-5f;
    return status != CUFLASH_SUCCESS || !right || cuflash_abi_version() != CUFLASH_ABI_VERSION;
}
