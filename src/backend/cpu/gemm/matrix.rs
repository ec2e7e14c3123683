//! Products of f32 matrices whose rows and columns may lie at any distance, on one thread.

/// A row-major matrix, or a window into one.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    /// Elements from a row to the next, and from a column to the next.
    strides: (usize, usize),
}

impl<'a> Matrix<'a> {
    /// `rows` rows of `stride` elements, of which the first `cols` count.
    ///
    /// # Panics
    /// Where `data` is too short.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Matrix<'a> {
        assert!(rows == 0 || data.len() >= (rows - 1) * stride + cols, "the matrix fits its data");
        Matrix { data, rows, cols, strides: (stride, 1) }
    }

    /// Rows become columns.
    pub fn transposed(self) -> Matrix<'a> {
        Matrix { rows: self.cols, cols: self.rows, strides: (self.strides.1, self.strides.0), ..self }
    }
}

/// `c = alpha · a · b + beta · c` on the calling thread; rows of `c` are `stride` elements apart.
///
/// # Panics
/// Where shapes do not fit.
pub fn gemm(alpha: f32, a: Matrix<'_>, b: Matrix<'_>, beta: f32, c: &mut [f32], stride: usize) {
    assert_eq!(a.cols, b.rows, "inner dimensions agree");
    let (m, k, n) = (a.rows, a.cols, b.cols);
    if m == 0 || n == 0 {
        return;
    }
    assert!(c.len() >= (m - 1) * stride + n, "the output fits its data");
    // SAFETY: `Matrix::new` checked that every row and column of `a` and `b` lies in its slice (strides only
    // ever trade places), the line above checked `c`, and `c` is borrowed mutably.
    unsafe {
        matrixmultiply::sgemm(
            m,
            k,
            n,
            alpha,
            a.data.as_ptr(),
            a.strides.0 as isize,
            a.strides.1 as isize,
            b.data.as_ptr(),
            b.strides.0 as isize,
            b.strides.1 as isize,
            beta,
            c.as_mut_ptr(),
            stride as isize,
            1,
        );
    }
}
